"""Where the nodes of an Indexed Job meet: served by the pod of index 0, asked by all.

One server a run. It hands out what Horovod's Gloo ranks tell each other (the key-value store that
`horovodrun` would serve: PUT, GET and DELETE of /scope/key), and two things of ours: whether all
nodes are here, and how all of them ended. A node that comes twice has lost its ranks, and with
them the run: the server says so to the pod it runs in.
"""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PREEMPTED = 75
_SECONDS = 5.0


def verdict(codes: dict[int, int]) -> int:
    """One exit code for all nodes, so that each is started again or none.

    0 if all are 0; 75 if no other but 0 is among them; 2 (bad settings) before any other, since
    the others fail for want of that rank; else that of the first node with one.
    """
    failed = [code for _, code in sorted(codes.items()) if code not in (0, PREEMPTED)]
    if failed:
        return 2 if 2 in failed else failed[0]
    return PREEMPTED if PREEMPTED in codes.values() else 0


class Meeting(ThreadingHTTPServer):
    """Serves until it is closed.

    Args:
        nodes: How many have to come.
        port: 0 for a free one.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, nodes: int, port: int) -> None:
        self.nodes = nodes
        self.changed = threading.Condition()
        self.members: dict[int, str] = {}
        self.codes: dict[int, int] = {}
        self.heard: set[int] = set()
        self.lost: int | None = None
        self.store: dict[str, bytes] = {}
        super().__init__(("", port), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def join(self, index: int, token: str) -> bool:
        """Takes a node in; not one that comes again after the ranks were started."""
        with self.changed:
            complete = len(self.members) == self.nodes
            if complete and self.members[index] != token:
                self.lost = index
                return False
            self.members[index] = token
            self.changed.notify_all()
            return True

    def ended(self, index: int, code: int) -> None:
        """Notes how a node's ranks ended."""
        with self.changed:
            self.codes[index] = code
            self.changed.notify_all()

    def wait_for_all_ends(self, seconds: float) -> bool:
        """Whether every node said in time how it ended."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.codes) == self.nodes, seconds)

    def wait_until_heard(self, seconds: float) -> None:
        """Until every node has been told how all ended; one that is gone does not ask."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.heard) == self.nodes, seconds)


class _Handler(BaseHTTPRequestHandler):
    timeout = _SECONDS
    server: Meeting  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        meeting = self.server
        with meeting.changed:
            if self.path == "/members":
                here = len(meeting.members)
                self._answer(200 if here == meeting.nodes else 404, str(here).encode())
            elif self.path.startswith("/ends/"):
                known = len(meeting.codes) == meeting.nodes
                code = str(verdict(meeting.codes)).encode()
                self._answer(200 if known else 404, code if known else b"")
                if known:
                    meeting.heard.add(int(self.path.rpartition("/")[2]))
                    meeting.changed.notify_all()
            else:
                value = meeting.store.get(self.path)
                self._answer(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, place, name, *_ = [*self.path.split("/"), "", ""]
        if place in ("members", "ends") and not (name.isdigit() and int(name) < self.server.nodes):
            self._answer(400)
        elif place == "members":
            self._answer(200 if self.server.join(int(name), body.decode()) else 409)
        elif place == "ends":
            self.server.ended(int(name), int(body))
            self._answer(200)
        else:
            with self.server.changed:
                self.server.store[self.path] = body
            self._answer(200)

    def do_DELETE(self) -> None:
        # A rank that is done with a scope; others may still read it, and the run is not long.
        self._answer(200)

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def ask(host: str, port: int, method: str, path: str, body: str = "") -> tuple[int, bytes] | None:
    """The server's status and answer; none if it cannot be reached."""
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request(method, path, body.encode())
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
