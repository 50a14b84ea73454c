"""Starts pytest itself under `horovodrun` and `mpiexec`: one launch for all tests of `ranks/`."""

from __future__ import annotations

import json
import os

import pytest

from tests.distributed import launcher

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_ranks(backend, size, tmp_path, reference, record_property):
    only = os.environ.get("RANK_TESTS", "tests/distributed/ranks").split()
    finished = launcher.launch(
        backend,
        size,
        ["-m", "pytest", *only, "-p", "tests.distributed.rank_plugin", *_OPTIONS],
        tmp_path,
        deadline=900,
        env={
            "ORCHESTRATOR_TEST_FOLDER": str(tmp_path),
            "ORCHESTRATOR_TEST_BACKEND": backend,
            "ORCHESTRATOR_TEST_SIZE": str(size),
            "ORCHESTRATOR_TEST_REFERENCE": str(reference),
        },
    )
    told = f"{backend} x {size}, exit {finished.returncode}\n{launcher.tails(tmp_path)}"
    assert finished.returncode == 0, told
    assert finished.left == []
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(size)]
    assert len(list(tmp_path.glob("rank-*.json"))) == size
    outcomes = ranks[0]["outcomes"]
    assert all(rank["outcomes"] == outcomes for rank in ranks), told
    assert set(outcomes.values()) == {"passed"}, told
    record_property("seconds", round(finished.seconds, 1))
    record_property("passed_on_each_rank", len(outcomes))
    _show(backend, size, finished.seconds, ranks)


_OPTIONS = [
    *("-p", "no:cacheprovider", "-v", "--tb=short", "--color=no", "--durations=5"),
    # A rank that waits for one that never comes shows where, and ends the job.
    *("-o", "faulthandler_timeout=0", "--timeout=240", "--timeout-method=thread"),
]


def _show(backend, size, seconds, ranks):
    """The figures, in the test's captured output (`pytest -rP` shows it)."""
    outcomes = list(ranks[0]["outcomes"].values())
    print(f"{backend} x {size}: {seconds:.1f} s, {len(outcomes)} passed on each rank")
    for name in sorted({name for rank in ranks for name in rank["figures"]}):
        print(f"  {name}: {max(rank['figures'].get(name, 0.0) for rank in ranks):.3g}")
