"""A run on a cluster: submitted, followed to its end, started again; thin over Kubernetes' API."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from orchestrator.config import SettingError

Tree = dict[str, Any]

PREEMPTED = 75
_PLURALS = {"NetworkPolicy": "networkpolicies"}
_JOBS = ("Job", "MPIJob", "TrainJob")
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


class Cluster:
    """The API of a cluster, for one namespace.

    Args:
        context: Of the kubeconfig; by default the current one.
        namespace: By default the context's.

    Raises:
        SettingError: The client is not installed, or no cluster is configured.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        try:
            from kubernetes import client, config
        except ImportError:
            raise SettingError(
                "the Kubernetes client is not installed: pip install 'keras-orchestrator[k8s]'"
            ) from None
        self._failure = client.ApiException
        try:
            self._api = config.new_client_from_config(context=context)
            contexts: Any = config.list_kube_config_contexts()
        except config.ConfigException as error:
            raise SettingError(
                f"no cluster is configured: {error}. Set KUBECONFIG, or --context to a known one."
            ) from None
        known, chosen = contexts
        if context is not None:
            chosen = next(one for one in known if one["name"] == context)
        self.namespace = namespace or chosen["context"].get("namespace") or "default"

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """One request; its answer, still to be read.

        Raises:
            kubernetes.client.ApiException: With the status that the server gave.
        """
        headers = {"Accept": "application/json, */*"}
        if method == "PATCH":
            headers["Content-Type"], body = "application/apply-patch+yaml", json.dumps(body)
        elif body is not None:
            headers["Content-Type"] = "application/json"
        request = self._api.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = self._api.call_api(*request)
        if not 200 <= answer.status < 300:
            answer.read()
            raise self._failure(http_resp=answer)
        return answer

    def json(self, method: str, path: str, body: Any = None, **query: Any) -> Tree:
        """One request and its answer."""
        return json.loads(self.call(method, path, body, **query).read())

    def path(self, manifest: Tree, *, name: bool = True) -> str:
        """Where an object stands, or its kind."""
        version, kind = manifest["apiVersion"], manifest["kind"]
        plural = _PLURALS.get(kind, f"{kind.lower()}s")
        root = "apis" if "/" in version else "api"
        namespace = manifest["metadata"].get("namespace", self.namespace)
        end = f"/{manifest['metadata']['name']}" if name else ""
        return f"/{root}/{version}/namespaces/{namespace}/{plural}{end}"

    def apply(self, manifests: list[Tree]) -> None:
        """Makes or updates what stands around a job, and makes the job.

        Raises:
            SettingError: A job of this name is there already.
        """
        for one in manifests:
            if one["kind"] not in _JOBS:
                self.json("PATCH", self.path(one), one, fieldManager="orchestrator", force="true")
                continue
            try:
                self.json("POST", self.path(one, name=False), one)
            except self._failure as error:
                if error.status != 409:
                    raise
                raise SettingError(
                    f"{one['kind']} {one['metadata']['name']} is there already: end it with "
                    "`orchestrator k8s delete`, or set another kubernetes.name."
                ) from None

    def delete(self, manifests: list[Tree], *, wait: float = 0.0) -> list[str]:
        """Ends and removes what of these is there; gives it by kind and name.

        Args:
            manifests: The last is ended first.
            wait: Seconds until a job has to be gone, its pods with it; 0 does not wait.
        """
        gone = []
        for one in reversed(manifests):
            try:
                self.json("DELETE", self.path(one), {"propagationPolicy": "Foreground"})
                gone.append(f"{one['kind']} {one['metadata']['name']}")
            except self._failure as error:
                if error.status != 404:
                    raise
        end = time.monotonic() + wait
        for one in (one for one in manifests if one["kind"] in _JOBS):
            while time.monotonic() < end and self.get(one) is not None:
                time.sleep(min(0.5, wait))
        return gone

    def get(self, manifest: Tree) -> Tree | None:
        """The object as it stands; none if it does not."""
        try:
            return self.json("GET", self.path(manifest))
        except self._failure as error:
            if error.status == 404:
                return None
            raise

    def pods(self, name: str) -> list[Tree]:
        """The pods of a job, the newest first."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        found = self.json("GET", path, labelSelector=f"app.kubernetes.io/instance={name}")["items"]
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True)

    def wait(self, job: Tree, seconds: float) -> None:
        """Returns once a job is no longer as it was when it was read, and after that time anyway.

        A watch on the one object (https://kubernetes.io/docs/reference/using-api/api-concepts/).
        """
        name, version = job["metadata"]["name"], job["metadata"].get("resourceVersion", "")
        try:
            answer = self.call(
                "GET",
                self.path(job, name=False),
                watch="true",
                fieldSelector=f"metadata.name={name}",
                resourceVersion=version,
                timeoutSeconds=max(1, round(seconds)),
            )
        except self._failure as error:
            if error.status not in (404, 410):  # gone, or too much has happened since
                raise
            time.sleep(min(seconds, 1.0))
            return
        with contextlib.closing(answer.response) as response:
            next(response.stream(), None)

    def log(self, pod: Tree, *, follow: bool) -> Iterator[str]:
        """The lines of a pod's log, as they come."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/log"
        answer = self.call("GET", path, follow=str(follow).lower())
        rest = b""
        for part in answer.response.stream(2**16):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
        if rest:
            yield rest.decode(errors="replace")


def job_of(manifests: list[Tree]) -> Tree:
    """The job among a run's manifests."""
    return next(one for one in manifests if one["kind"] in _JOBS)


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
