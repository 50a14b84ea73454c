"""The reference is worth comparing with, and MirroredStrategy gives the same."""

from __future__ import annotations

import json

import pytest

from tests.distributed import equivalence, launcher

pytestmark = pytest.mark.distributed


def test_the_reference_cuts_the_rate_then_stops(reference):
    result = json.loads(reference.read_text())
    decisions = result["decisions"]
    (stop,) = decisions["stop"]
    assert decisions["plateau"]
    assert decisions["plateau"][0] < stop < equivalence.EPOCHS - 1
    assert decisions["restore"] == [decisions["best"][-1]]
    assert len(result["metrics"]["val_loss"]) == stop + 1
    assert set(result["metrics"]) == {
        f"val_{name}" for name in ("loss", "accuracy", "auc", "f1", "iou", "r2")
    }
    assert result["metrics"]["val_accuracy"][-1] > 0.85
    # No decision hangs on a rounding.
    assert equivalence.margin(result) > 1e-4


def test_four_mirrored_replicas_equal_the_single_process(reference, tmp_path, record_property):
    path = tmp_path / "mirrored.json"
    command = ["-m", "tests.distributed.equivalence", str(path), "mirrored", "4"]
    env = {"TF_NUM_INTEROP_THREADS": "8"}  # the replicas are threads of one process
    finished = launcher.launch("none", 1, command, tmp_path, deadline=550, env=env)
    assert finished.returncode == 0, launcher.tails(tmp_path)
    ours, theirs = json.loads(path.read_text()), json.loads(reference.read_text())
    assert ours["decisions"] == theirs["decisions"]
    assert ours["rates"] == theirs["rates"]
    differences = equivalence.differences(ours, theirs)
    print(f"mirrored x 4: {finished.seconds:.1f} s", differences)
    record_property("worst_difference", max(differences.values()))
    assert max(differences.values()) <= 1e-5, differences
