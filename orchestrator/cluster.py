"""The API of a Kubernetes cluster, as far as a run needs it; thin over the official client."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from orchestrator.config import SettingError

Tree = dict[str, Any]

_PLURALS = {"NetworkPolicy": "networkpolicies"}
JOBS = ("Job", "MPIJob", "TrainJob")


class Cluster:
    """The API of a cluster, for one namespace.

    Args:
        context: Of the kubeconfig; by default the current one.
        namespace: By default the context's.

    Attributes:
        namespace: Where everything is that does not say so itself.
        failures: What a request raises that was refused, got no answer, or only a part of one.

    Raises:
        SettingError: The client is not installed, or no cluster is configured.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        try:
            from kubernetes import client, config
            from urllib3.exceptions import HTTPError
        except ImportError:
            raise SettingError(
                "the Kubernetes client is not installed: pip install 'keras-orchestrator[k8s]'"
            ) from None
        self._failure = client.ApiException
        self.failures: tuple[type[Exception], ...] = (client.ApiException, HTTPError)
        ways = client.Configuration()
        ways.keep_alive = True  # a stream whose other side vanished ends
        try:
            self._api = config.new_client_from_config(context=context, client_configuration=ways)
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
            if one["kind"] not in JOBS:
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
        for one in (one for one in manifests if one["kind"] in JOBS):
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

        Also where it cannot be watched, since whoever waits looks at the job itself then. A watch
        on the one object (https://kubernetes.io/docs/reference/using-api/api-concepts/).
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
            with contextlib.closing(answer.response) as response:
                next(response.stream(), None)
        except self.failures as error:
            # Gone, or too much has happened since: there is something to see.
            soon = getattr(error, "status", None) in (404, 410)
            time.sleep(min(seconds, 1.0) if soon else seconds)

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


def in_words(failure: Any) -> str:
    """A failure of a request on one line: its status, or what became of the connection."""
    said = failure.args[0] if failure.args else f"{failure.status} {failure.reason}"
    return " ".join(str(said).split())
