"""MirroredStrategy on logical CPU devices: partial batches, batches smaller than the replicas."""

from __future__ import annotations

import json

import pytest

from tests import metric_cases
from tests.distributed import launcher

pytestmark = pytest.mark.distributed


# All cases on two replicas; on four those that have most to do with their number.
@pytest.mark.parametrize(
    ("replicas", "names"),
    [(2, ()), (4, ("last batch of one sample", "one batch, of three samples"))],
)
def test_it_equals_one_process(replicas, names, tmp_path, record_property):
    path = tmp_path / "found.json"
    command = ["-W", "ignore", "-m", "tests.distributed.mirrored", str(path), str(replicas)]
    command += names
    env = {"TF_NUM_INTEROP_THREADS": "8"}  # the replicas are threads of one process
    finished = launcher.launch("none", 1, command, tmp_path, deadline=300, env=env)
    assert finished.returncode == 0, launcher.tails(tmp_path)
    found = json.loads(path.read_text())
    print(f"mirrored x {replicas}: {finished.seconds:.1f} s", found)
    metrics = found.pop("metrics")
    assert len(metrics) == len(metric_cases.CASES)
    assert max(metrics.values()) <= 1e-6, metrics
    accumulation = found.pop("accumulation")
    assert "gradient_accumulation_steps=2" in accumulation, accumulation
    assert len(found) == (len(names) or 8)
    for name, worst in found.items():
        assert worst["weights"] <= 1e-6, (name, worst)
        assert worst["loss"] <= 1e-6, (name, worst)
    record_property("worst", max(worst["weights"] for worst in found.values()))
