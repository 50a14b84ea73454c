"""A run on a cluster: how its job stands, and submitted, followed to its end, started again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from orchestrator.cluster import JOBS, Cluster, Tree, in_words

PREEMPTED = 75
_T = TypeVar("_T")
_PATIENCE = 600.0  # seconds that an API server may be out of reach
_DONE = {"Complete": True, "Succeeded": True, "Failed": False}
_ROLE, _INDEX = "app.kubernetes.io/component", "batch.kubernetes.io/job-completion-index"
# What a pod of rank 0's log is, in the three kinds of job.
_FIRST = ((_ROLE, "launcher"), (_INDEX, "0"))
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
        first = any(labels.get(key) == value for key, value in _FIRST)
        if first and labels.get(_ROLE) != "worker":  # a TrainJob's have an index, too
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
    """Whether a pod was evicted or preempted, or its ranks were and have committed.

    Only the last pod in each place counts: those before it are of earlier attempts.

    Args:
        pods: The newest first.
    """
    last: dict[tuple[str, str], Tree] = {}
    for pod in pods:
        last.setdefault(_place(pod), pod)
    for pod in last.values():
        status = pod.get("status", {})
        taken = any(
            one.get("type") == "DisruptionTarget" and one.get("status") == "True"
            for one in status.get("conditions") or []
        )
        if taken or status.get("reason") in _LOST:
            return True
    return exit_code(first_pod(pods)) == PREEMPTED


def _place(pod: Tree) -> tuple[str, str]:
    """What a pod has in common with the one that comes instead of it, and with no other."""
    labels, name = pod["metadata"].get("labels", {}), pod["metadata"]["name"]
    role = labels.get(_ROLE, "")
    # An operator's worker keeps its name; the one launcher never does.
    return role, labels.get(_INDEX, "" if role == "launcher" else name)


def _has_started(pod: Tree) -> bool:
    return pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")


def follow(
    cluster: Cluster, job: Tree, say: Callable[[str], None], *, every: float = 10.0
) -> tuple[int, bool]:
    """Shows rank 0's log, over all its pods, until the job has ended.

    Waits for changes of the job by a watch, and looks by itself every so many seconds. Neither a
    log nor a watch that fails ends this, nor an API server that is out of reach for a while.

    Returns:
        Its exit code, and whether it was preempted rather than failed.
    """
    name, followed, pods = job["metadata"]["name"], set(), []
    while True:
        found, now = _patiently(cluster, say, every, lambda: (cluster.get(job), cluster.pods(name)))
        stands, pods = state(found), now or pods
        pod = first_pod(pods)
        if (
            pod is not None
            and pod["metadata"]["uid"] not in followed
            and _has_started(pod)
            and _show_log(cluster, pod, say)
        ):
            followed.add(pod["metadata"]["uid"])
            continue
        if stands.finished:
            if stands.succeeded:
                return 0, False
            return exit_code(pod) or 1, was_taken(pods)
        cluster.wait(found or job, every)


def _show_log(cluster: Cluster, pod: Tree, say: Callable[[str], None]) -> bool:
    """Whether that was all there is to show: not, if there is no log yet of a pod that runs."""
    begun = False
    try:
        for line in cluster.log(pod, follow=True):
            begun = True
            say(line)
    except cluster.failures as error:
        what = "no more of the log" if begun else "no log"
        say(f"k8s: {what} of {pod['metadata']['name']}: {in_words(error)}")
        return begun or pod["status"]["phase"] != "Running"
    return True


def _patiently(
    cluster: Cluster, say: Callable[[str], None], pause: float, ask: Callable[[], _T]
) -> _T:
    """What requests come to, made again while the API server cannot answer them."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return ask()
        except cluster.failures as error:
            status = getattr(error, "status", None) or 500
            if (status < 500 and status != 429) or time.monotonic() >= end:
                raise
            say(f"k8s: the API server did not answer, asking again: {in_words(error)}")
            time.sleep(pause)


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
    cluster.apply(manifests)
    for attempt in range(resubmit + 1):
        say(f"k8s: {what} submitted" + (f", attempt {attempt + 1}" if attempt else ""))
        code, taken = follow(cluster, job, say, every=every)
        how = "preempted" if taken else "succeeded" if code == 0 else "failed"
        say(f"k8s: {what} {how}, exit code {code}")
        if not taken or attempt == resubmit:
            break
        _patiently(cluster, say, every, lambda: cluster.delete([job], wait=600.0))
        _patiently(cluster, say, every, lambda: cluster.apply(manifests))
    return code
