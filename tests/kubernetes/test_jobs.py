"""Which of a job's pods has rank 0's log, and whether a job that ended was taken away."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import jobs


def pod(component, code, name="", index="", **status: Any):
    labels = {"app.kubernetes.io/component": component}
    labels |= {"batch.kubernetes.io/job-completion-index": index} if index else {}
    ended = [{"state": {"terminated": {"exitCode": code}}}]
    return {
        "metadata": {"name": name or f"{component}-{index}", "labels": labels},
        "status": {"containerStatuses": ended, **status},
    }


DISRUPTED: dict[str, Any] = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}


@pytest.mark.parametrize(
    ("taken", "pods"),
    [
        (True, [pod("launcher", 1), pod("worker", 137, "train-worker-0", **DISRUPTED)]),
        (True, [pod("worker", 1, "train-worker-1"), pod("launcher", 1),
                pod("worker", 137, "train-worker-0", reason="Evicted")]),
        (False, [pod("launcher", 1, "b"), pod("launcher", 137, "a", **DISRUPTED)]),
        (True, [pod("node", 1, index="0"), pod("node", 137, index="1", **DISRUPTED)]),
        (False, [pod("node", 1, index="0"), pod("node", 1, index="1"),
                 pod("node", 137, "b", index="1", **DISRUPTED), pod("node", 75, "a", index="0")]),
    ],
)  # fmt: skip
def test_the_last_pod_in_each_place_says_whether_a_job_was_taken_away(taken, pods):
    assert jobs.was_taken(pods) == taken


@pytest.mark.parametrize(
    "pods",
    [
        [pod("worker", 0, "train-worker-0"), pod("launcher", 0, "first")],
        # A TrainJob's, whose jobs are all Indexed ones.
        [pod("worker", 0, index="0"), pod("launcher", 0, "first", index="0")],
        [pod("node", 0, index="1"), pod("node", 0, "first", index="0")],
    ],
)
def test_rank_0_writes_to_the_launchers_log_or_that_of_index_0(pods):
    found = jobs.first_pod(pods)
    assert found is not None
    assert found["metadata"]["name"] == "first"
