"""An API server's stand-in: keeps objects, records requests, plays a job's attempts, and fails."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import yaml

JOBS = ("jobs", "mpijobs", "trainjobs")
CUT = 0  # in the place of a status: the stream, or the connection, breaks off


class Attempt(NamedTuple):
    """How a job goes once it is made: its pods' exit codes, one after the other.

    Attributes:
        codes: Of rank 0's pods; with each but the last another pod starts.
        reasons: Of these pods from the first, such as Evicted; none by default.
    """

    codes: tuple[int, ...]
    reasons: tuple[str, ...] = ()


class Server(ThreadingHTTPServer):
    """Args: attempts: For each time that the job is made.

    Attributes:
        faults: Statuses, or `CUT`, that the next requests of a kind get: `log`, `watch`, `pods`, or
            a method.
    """

    daemon_threads = True

    def __init__(self, attempts: list[Attempt], first: dict[str, str]) -> None:
        self.attempts = attempts
        self.first = first
        self.requests: list[str] = []
        self.bodies: list[Any] = []
        self.objects: dict[str, Any] = {}
        self.pods: list[dict[str, Any]] = []
        self.watched = threading.Event()  # set to end streams
        self.playing: tuple[str, list[tuple[int, str]]] | None = None
        self.faults: dict[str, list[int]] = {}
        super().__init__(("127.0.0.1", 0), _Handler)

    def start_pod(self) -> None:
        index = len(self.pods)
        labels = {"app.kubernetes.io/instance": "train", **self.first}
        self.pods.append(
            {
                "metadata": {
                    "name": f"train-{index}",
                    "uid": f"uid-{index}",
                    "labels": labels,
                    "creationTimestamp": f"2026-01-01T00:00:{index:02d}Z",
                },
                "status": {"phase": "Pending"},
            }
        )

    def change(self, path: str) -> bool:
        """What a cluster does meanwhile: the newest pod starts to run, or has no log and ends."""
        phase = self.pods[-1]["status"]["phase"] if self.pods else ""
        if phase == "Running":
            self.end_pod()
        elif phase == "Pending":
            running = [{"state": {"running": {}}}]
            self.pods[-1]["status"] = {"phase": "Running", "containerStatuses": running}
        else:
            return False
        metadata = self.objects[path]["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)
        return True

    def end_pod(self) -> None:
        """The pod that runs ends with the next code; the last of them ends the job."""
        assert self.playing is not None
        path, ends = self.playing
        code, reason = ends.pop(0)
        status = self.pods[-1]["status"]
        status["phase"] = "Failed" if code else "Succeeded"
        status["containerStatuses"] = [{"state": {"terminated": {"exitCode": code}}}]
        status |= {"reason": reason} if reason else {}
        if ends:
            self.start_pod()
            return
        good = "Complete" if path.split("/")[-2] == "jobs" else "Succeeded"
        condition = {"type": "Failed" if code else good, "status": "True", "reason": "Played"}
        self.objects[path]["status"] = {"conditions": [condition]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def _serve(self) -> None:
        url = urllib.parse.urlparse(self.path)
        self.server.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.bodies.append(copy.deepcopy(body))
        assert self.headers["Authorization"] == "Bearer token-of-the-test"
        found = self.server.objects.get(url.path)
        log = re.fullmatch(r".*/pods/(train-\d+)/log", url.path)
        kind = "log" if log else "watch" if "watch=true" in url.query else self.command.lower()
        kind = "pods" if url.path.endswith("/pods") else kind
        faults = self.server.faults.get(kind)
        fault = faults.pop(0) if faults else None
        self._cut = fault == CUT
        if fault:
            self._answer(fault, {"kind": "Status", "reason": "Played"})
        elif self._cut and kind not in ("log", "watch"):
            self.close_connection = True
        elif log:
            self._log(log[1], follow="follow=true" in url.query)
        elif kind == "watch":
            self._watch(url.path, urllib.parse.parse_qs(url.query))
        elif kind == "pods":
            self._answer(200, {"items": self.server.pods})
        elif self.command == "PATCH":
            assert self.headers["Content-Type"] == "application/apply-patch+yaml"
            self.server.objects[url.path] = body
            self._answer(200, body)
        elif self.command == "POST":
            self._create(url.path, body or {})
        elif found is None:
            self._answer(404, {"kind": "Status", "reason": "NotFound"})
        elif self.command == "DELETE":
            del self.server.objects[url.path]
            self._answer(200, {"kind": "Status"})
        else:
            self._answer(200, found)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def _create(self, path: str, body: dict[str, Any]) -> None:
        path = f"{path}/{body['metadata']['name']}"
        if path in self.server.objects:
            self._answer(409, {"kind": "Status", "reason": "AlreadyExists"})
            return
        body["metadata"]["resourceVersion"] = "1"
        self.server.objects[path] = body
        if path.split("/")[-2] in JOBS and self.server.attempts:
            attempt = self.server.attempts.pop(0)
            reasons = itertools.chain(attempt.reasons, itertools.repeat(""))
            self.server.playing = (path, list(zip(attempt.codes, reasons, strict=False)))
            self.server.start_pod()
        self._answer(201, body)

    def _watch(self, path: str, asked: dict[str, list[str]]) -> None:
        """One event, if there is something to tell; the stream then stays open for its time."""
        name = asked["fieldSelector"][0].removeprefix("metadata.name=")
        found = self.server.objects[f"{path}/{name}"]
        if asked["resourceVersion"][0] != found["metadata"]["resourceVersion"]:
            self._answer(410, {"kind": "Status", "reason": "Expired"})
            return
        with self._stream() as send:
            if not self._cut and self.server.change(f"{path}/{name}"):
                send(json.dumps({"type": "MODIFIED", "object": found}))
                self.server.watched.wait(float(asked["timeoutSeconds"][0]))

    def _log(self, pod: str, *, follow: bool) -> None:
        with self._stream() as send:
            send(f"{pod}: epoch 1")
            send(f"{pod}: épilogue")
            if follow and not self._cut and self.server.pods[-1]["status"]["phase"] == "Running":
                self.server.end_pod()

    @contextlib.contextmanager
    def _stream(self) -> Iterator[Callable[[str], None]]:
        """Lines in chunks, as an API server sends them; the client may be gone meanwhile."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def send(line: str) -> None:
            data = f"{line}\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        with contextlib.suppress(ConnectionError):
            yield send
            self.wfile.write(b"" if self._cut else b"0\r\n\r\n")
        self.close_connection = True

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(*attempts: Attempt, first: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that runs while the block does."""
    labels = first or {"app.kubernetes.io/component": "launcher"}
    server = Server(list(attempts), labels)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.watched.set()
        server.shutdown()
        thread.join()
        server.server_close()


def kubeconfig(server: Server) -> str:
    """A kubeconfig for it."""
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {"token": "token-of-the-test"}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": "me", "namespace": "ml"}}
            ],
        }
    )
