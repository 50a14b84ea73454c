"""What really goes over the wire, counted by Horovod itself in its timeline."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.distributed import launcher
from tests.distributed.counted import ACCUMULATE, BUCKETS, EPOCHS, STEPS

pytestmark = pytest.mark.distributed


def executed(timeline: Path) -> Counter[str]:
    """How often each tensor was reduced, broadcast or gathered; eager ones share a name."""
    # Horovod writes a JSON list as it goes, and may leave it open.
    events = json.loads(timeline.read_text().rstrip().rstrip("],") + "]")
    names = {e["pid"]: e["args"].get("name") for e in events if e.get("name") == "process_name"}
    done = ("ALLREDUCE", "BROADCAST", "ALLGATHER")
    return Counter(names[e["pid"]] for e in events if e.get("ph") == "B" and e["name"] in done)


def test_one_allreduce_an_evaluation_and_one_group_a_bucket_and_step(tmp_path):
    timeline = tmp_path / "timeline.json"
    command = ["-W", "ignore", "-m", "tests.distributed.counted"]
    env = {"HOROVOD_TIMELINE": str(timeline)}
    finished = launcher.launch("horovod", 2, command, tmp_path, env=env)
    assert finished.returncode == 0, finished.output
    counts = executed(timeline)
    plain, accumulating = (
        {name: n for name, n in counts.items() if f"optimizer.{number}." in name}
        for number in (0, 1)
    )
    # Each tensor of a group has its line: kernels and biases of four layers, a count a bucket.
    assert len(plain) == 2 * 4 + BUCKETS
    assert set(plain.values()) == {EPOCHS * STEPS}
    # Accumulated gradients travel when they are applied; the count, one number, each step.
    (count,) = (name for name in accumulating if ".count." in name)
    assert accumulating.pop(count) == EPOCHS * STEPS
    assert len(accumulating) == 2 * 4
    assert set(accumulating.values()) == {EPOCHS * STEPS // ACCUMULATE}
    # Five metrics and the loss, training and validation: one allreduce an epoch.
    assert counts["HorovodAllreduce"] == 2 * EPOCHS
    # Once a run, whatever its length: the seed (two), and for each model its weights; two for
    # whether all have their GPU, and for each object that is compared (both calls of `shard`, the
    # first step's weights).
    assert counts["HorovodBroadcast"] == 2 + 2
    assert counts["HorovodAllgather"] == 2 * (1 + 6)
    assert len(counts) == len(plain) + len(accumulating) + 1 + 3
