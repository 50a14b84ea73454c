"""`ranks/` runs only where a launcher has started pytest; see test_launches.py."""

from __future__ import annotations

import os

import pytest

from tests.distributed import launcher

collect_ignore = [] if "ORCHESTRATOR_TEST_FOLDER" in os.environ else ["ranks"]


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A file: what the training of `equivalence` gives in one process that no launcher started."""
    folder = tmp_path_factory.mktemp("reference")
    command = ["-m", "tests.distributed.equivalence", str(folder / "reference.json"), "single"]
    finished = launcher.launch("none", 1, command, folder, deadline=120)
    assert finished.returncode == 0, launcher.tails(folder)
    return folder / "reference.json"
