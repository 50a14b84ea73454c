"""A run on a cluster: how its job stands, and submitted, followed to its end, started again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from orchestrator.cluster import JOBS, Cluster, Tree

PREEMPTED = 75
_DONE = {"Complete": True, "Succeeded": True, "Failed": False}
# What a pod of rank 0's log is, in the three kinds of job.
_FIRST = (
    ("app.kubernetes.io/component", "launcher"),
    ("batch.kubernetes.io/job-completion-index", "0"),
)
_LOST = ("Evicted", "Preempted", "Terminated", "NodeLost", "NodeShutdown")


class State(NamedTuple):
    """How a job stands.

    Attributes:
        finished: Whether it has ended.
        succeeded: Whether it ended well.
        reason: What its last condition says.
    """

    finished: bool
    succeeded: bool
    reason: str


def job_of(manifests: list[Tree]) -> Tree:
    """The job among a run's manifests."""
    return next(one for one in manifests if one["kind"] in JOBS)


def state(job: Tree | None) -> State:
    """How a job stands, by its conditions."""
    if job is None:
        return State(True, False, "it is not there")
    found = job.get("status", {}).get("conditions") or []
    for one in found:
        if one.get("type") in _DONE and one.get("status") == "True":
            text = f"{one['type']}: {one.get('reason', '')} {one.get('message', '')}".strip(": ")
            return State(True, _DONE[one["type"]], re.sub(r"\s+", " ", text))
    active = [one["type"] for one in found if one.get("status") == "True"]
    return State(False, False, active[-1] if active else "Pending")


def first_pod(pods: list[Tree]) -> Tree | None:
    """The newest pod whose log is rank 0's; of one without ranks elsewhere, the newest."""
    for pod in pods:
        labels = pod["metadata"].get("labels", {})
        if any(labels.get(key) == value for key, value in _FIRST):
            return pod
    return None


def exit_code(pod: Tree | None) -> int | None:
    """The exit code of a pod's container; none while it runs, or if it is lost."""
    statuses = (pod or {}).get("status", {}).get("containerStatuses") or []
    for one in statuses:
        ended = one.get("state", {}).get("terminated")
        if ended is not None:
            return int(ended["exitCode"])
    return None


def was_taken(pods: list[Tree]) -> bool:
    """Whether a pod was evicted or preempted, or its ranks were and have committed."""
    for pod in pods:
        status = pod.get("status", {})
        taken = any(
            one.get("type") == "DisruptionTarget" and one.get("status") == "True"
            for one in status.get("conditions") or []
        )
        if taken or status.get("reason") in _LOST:
            return True
    return exit_code(first_pod(pods)) == PREEMPTED


def _has_started(pod: Tree) -> bool:
    return pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")


def follow(
    cluster: Cluster, job: Tree, say: Callable[[str], None], *, every: float = 10.0
) -> tuple[int, bool]:
    """Shows rank 0's log, over all its pods, until the job has ended.

    Waits for changes of the job by a watch, and looks by itself every so many seconds.

    Returns:
        Its exit code, and whether it was preempted rather than failed.
    """
    name, followed, pods = job["metadata"]["name"], set(), []
    while True:
        found = cluster.get(job)
        stands = state(found)
        pods = cluster.pods(name) or pods
        pod = first_pod(pods)
        if pod is not None and pod["metadata"]["uid"] not in followed and _has_started(pod):
            followed.add(pod["metadata"]["uid"])
            for line in cluster.log(pod, follow=True):
                say(line)
            continue
        if stands.finished:
            if stands.succeeded:
                return 0, False
            return exit_code(pod) or 1, was_taken(pods)
        cluster.wait(found or job, every)


def submit(
    cluster: Cluster,
    manifests: list[Tree],
    say: Callable[[str], None],
    *,
    resubmit: int = 0,
    every: float = 10.0,
) -> int:
    """Starts a run and follows it to its end.

    Args:
        cluster: Where.
        manifests: As `render` makes them.
        say: Takes each line to be shown.
        resubmit: How often a preempted or evicted job is made anew; each goes on from its newest
            checkpoint.
        every: Seconds between two looks at the job, if no change of it is told.

    Returns:
        The exit code of the last attempt.
    """
    job = job_of(manifests)
    what = f"{job['kind']} {job['metadata']['name']}"
    for attempt in range(resubmit + 1):
        cluster.apply(manifests)
        say(f"k8s: {what} submitted" + (f", attempt {attempt + 1}" if attempt else ""))
        code, taken = follow(cluster, job, say, every=every)
        how = "preempted" if taken else "succeeded" if code == 0 else "failed"
        say(f"k8s: {what} {how}, exit code {code}")
        if not taken or attempt == resubmit:
            break
        cluster.delete([job], wait=600.0)
    return code
