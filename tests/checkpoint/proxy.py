"""A TCP proxy that stands between a client and a storage server and does what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

_BLOCK = 2**16
_REQUEST = re.compile(rb"[A-Z]+ [^ ]+ HTTP/1\.1\r\n")
_WHO = {
    401: "Anonymous caller",
    403: "trainer@project.iam.gserviceaccount.com",
}
_REASONS = {401: "required", 403: "forbidden", 404: "notFound", 410: "gone"}


def _answer(status: int, kind: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _gcs_error(status: int) -> bytes:
    """The error of GCS's JSON API (https://cloud.google.com/storage/docs/json_api/v1/status-codes)."""
    message = http.HTTPStatus(status).phrase
    if status in _WHO:
        message = (
            f"{_WHO[status]} does not have storage.objects.create access to the Google Cloud "
            "Storage object. Permission 'storage.objects.create' denied on resource (or it may "
            "not exist)."
        )
    why = {"message": message, "domain": "global", "reason": _REASONS[status]}
    error = {"code": status, "message": message, "errors": [why]}
    return _answer(status, "application/json", json.dumps({"error": error}).encode())


_UNAVAILABLE = _answer(
    503, "application/xml", b"<Error><Code>SlowDown</Code><Message>storm</Message></Error>"
)


@dataclass(frozen=True)
class Fault:
    """What the proxy does to the connections.

    Attributes:
        kind: `none`; `refuse` (reset at once); `cut` (reset once `after` bytes were sent);
            `stall` (nothing passes for `seconds` once `after` bytes were sent); `slow` (`rate`
            bytes a second); `unavailable` (503 to each request); `denied` (`status` to each
            request, as GCS words it); `deaf` (the request passes and the connection is reset in
            place of the answer).
        after: Bytes that still pass, from the client, over all connections.
        seconds: How long a stall lasts, or, from the first one on, `unavailable`.
        rate: Bytes a second and connection.
        times: How often it happens before all is well again; without end if `None`.
        method: Only requests that begin with one of these, such as `PUT`; for `unavailable`,
            `denied` and `deaf`, as is `skip`.
        skip: Such requests that go well before the first that does not.
        status: 401, 403, 404 or 410; for `denied`.
    """

    kind: str = "none"
    after: int = 0
    seconds: float = 0.0
    rate: int = 0
    times: int | None = None
    method: bytes | tuple[bytes, ...] = b""
    skip: int = 0
    status: int = 403


class Proxy:
    """Listens on a free port of the loopback and passes on to another.

    Attributes:
        port: Where it listens.
        hits: How often the last fault happened.
        passed: Bytes from clients that were passed on.
    """

    def __init__(self) -> None:
        self.upstream = 0
        self.hits = 0
        self.passed = 0
        self._fault = Fault()
        self._matched = 0
        self._begun = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(self._listen)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    def _call(self, function: Callable):
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(10)

    def set(self, fault: Fault) -> None:
        """Begins a fault, for living connections too."""

        async def change() -> None:
            self._fault, self.passed, self._matched = fault, 0, 0
            self.hits = self.hits if fault == Fault() else 0
            if fault.kind == "refuse":
                self._reset_all()

        self._call(change)

    def close(self) -> None:
        """Ends all connections and stops listening."""

        async def end() -> None:
            self._server.close()
            self._reset_all()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    def _happens(self) -> bool:
        fault = self._fault
        if fault.times is not None and self.hits >= fault.times:
            return False
        self.hits += 1
        return True

    def _happens_to(self, data: bytes) -> bool:
        fault = self._fault
        if not (_REQUEST.match(data) and data.startswith(fault.method)):
            return False
        self._matched += 1
        if self._matched <= fault.skip:
            return False
        now = self._loop.time()
        self._begun = self._begun if self.hits else now
        if fault.seconds and now - self._begun > fault.seconds:
            return False
        return self._happens()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._fault.kind == "refuse" and self._happens():
            _reset(writer)
            return
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            _reset(writer)
            return
        both = {writer, upstream[1]}
        self._writers |= both
        deaf = asyncio.Event()
        up = self._forward(reader, upstream[1], writer, deaf)
        down = self._back(upstream[0], writer, deaf)
        tasks = [asyncio.ensure_future(up), asyncio.ensure_future(down)]
        try:
            with contextlib.suppress(asyncio.CancelledError):  # close() does; streams log it
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            self._writers -= both
            for one in both:
                with contextlib.suppress(OSError):
                    one.close()

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        deaf: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_BLOCK):
                fault = self._fault
                if fault.kind in ("unavailable", "denied") and self._happens_to(data):
                    denied = fault.kind == "denied"
                    client.write(_gcs_error(fault.status) if denied else _UNAVAILABLE)
                    await client.drain()
                    await _linger(reader)
                    return
                if fault.kind == "deaf" and self._happens_to(data):
                    deaf.set()
                over = self.passed + len(data) > fault.after
                if fault.kind == "cut" and over and self._happens():
                    _reset(client)
                    _reset(upstream)
                    return
                if fault.kind == "stall" and over and self._happens():
                    await asyncio.sleep(fault.seconds)
                if fault.kind == "slow" and fault.rate:
                    await asyncio.sleep(len(data) / fault.rate)
                self.passed += len(data)
                upstream.write(data)
                await upstream.drain()

    async def _back(
        self, upstream: asyncio.StreamReader, client: asyncio.StreamWriter, deaf: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await upstream.read(_BLOCK):
                if deaf.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    _reset(client)
                    return
                client.write(data)
                await client.drain()


async def _linger(reader: asyncio.StreamReader) -> None:
    # Closing at once would reset, and the answer with it.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            while await reader.read(_BLOCK):
                pass


def _reset(writer: asyncio.StreamWriter) -> None:
    transport = writer.transport
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            # Closing with a linger of 0 sends RST.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    transport.abort()
