"""What a launcher starts in a rank's place: starts the rank, signals it, tells how it ended.

Three processes stand where the launcher sees one:

    stand-in    the one the launcher knows, and kills if it kills at once (MPI_Abort).
    supervisor  in a session of its own, connected to `orchestrator launch`.
    the rank    the user's command, in a session of its own.

Each sees the others end, and none outlives them. All end with 0 as long as `orchestrator launch`
is there to hear the rank's own code: `horovodrun` would kill the other ranks 5 s after any other.

Run by its path, on every host, with nothing but the standard library: `python -IS rank.py COMMAND`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import cast

# secret, grace, port and addresses of `orchestrator launch`; the rank itself never sees it.
VARIABLE = "ORCHESTRATOR_LAUNCH"
PASSED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_RANK_VARIABLES = ("HOROVOD_RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
_CONNECT_SECONDS = 30.0
# Where the launcher has killed the stand-ins, the rank that made it may end by itself.
_ABORT_SECONDS = 0.5
_LEFTOVER_SECONDS = 1.0


def proof(secret: str, *words: str) -> str:
    """Shows that one knows the secret, which itself never travels.

    Args:
        secret: Known to both sides.
        words: Whose proof it is, and what the other side chose (HMAC, RFC 2104).
    """
    return hmac.new(secret.encode(), " ".join(words).encode(), "sha256").hexdigest()


def keep_alive(connection: socket.socket) -> None:
    """Has a host that vanished noticed within half a minute, whether or not anything is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    # What was sent and never arrived is else sent again for a quarter of an hour, without probes.
    for option, value in (*probes, ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def main(command: Sequence[str]) -> int:
    """Runs the command as this rank; gives the exit code for the launcher."""
    # Not KeyboardInterrupt: a traceback of ours says nothing to a user.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ours, theirs = socket.socketpair()
    supervisor = os.fork()
    if supervisor == 0:
        ours.close()
        os.setsid()
        return supervise(command, theirs)
    theirs.close()
    return _stand_in(supervisor, ours)


def _stand_in(supervisor: int, link: socket.socket) -> int:
    """Passes signals on until the supervisor has ended; ends the rank if that was killed."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, number)

    for number in PASSED:
        signal.signal(number, forward)
    with link.makefile("r") as lines:
        rank, ended = lines.readline(), lines.readline()
    if rank and not ended:
        _kill_group(int(rank))
    _, status = os.waitpid(supervisor, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def supervise(command: Sequence[str], link: socket.socket) -> int:
    """Connects to `orchestrator launch` and sees the rank through."""
    secret, grace, port, *addresses = os.environ.pop(VARIABLE).split(",")
    rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
    try:
        connection = _connect(addresses, int(port))
        _introduce(connection, secret, rank)
    except OSError as error:
        where = " or ".join(f"{address}:{port}" for address in addresses)
        print(
            f"orchestrator launch: rank {rank} on {socket.gethostname()} cannot reach the launcher "
            f"at {where}: {error}. Open the way from this host, or start from a host it can reach.",
            file=sys.stderr,
        )
        return 1
    return _Supervisor(connection, link, float(grace)).run(command)


def _connect(addresses: Sequence[str], port: int) -> socket.socket:
    error = OSError("no address is known")
    for address in addresses:
        try:
            return socket.create_connection((address, port), _CONNECT_SECONDS)
        except OSError as failed:
            error = failed
    raise error


def _introduce(connection: socket.socket, secret: str, rank: str) -> None:
    """Both sides prove that they know the secret; leaves the connection without a timeout."""
    # Unbuffered: what comes after these two lines is read elsewhere.
    with connection.makefile("rb", buffering=0) as lines:
        theirs = lines.readline(200).decode().strip()
        ours = secrets.token_hex(16)
        connection.sendall(f"{rank} {ours} {proof(secret, 'rank', rank, theirs)}\n".encode())
        answer = lines.readline(200).decode().strip()
    if not hmac.compare_digest(answer, proof(secret, "launcher", rank, ours)):
        raise ConnectionError("what answers there is not this launch")
    connection.settimeout(None)
    keep_alive(connection)


class _Supervisor:
    """One rank's life: waits for the start, passes signals on, reports, waits to be let go.

    It is let go when all ranks have ended. Until then it holds the launcher's pipe to the rank
    (PMI), so that MPICH does not take a rank that ended without MPI_Finalize as its cue to kill
    the others.
    """

    def __init__(self, connection: socket.socket, link: socket.socket, grace: float) -> None:
        self._connection = connection
        self._grace = grace
        self._link = link
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ, "gone")
        self._selector.register(link, selectors.EVENT_READ, "alone")
        self._received = b""
        self._words: deque[str] = deque()
        self._told = False
        self._heard = True
        self._alone = False

    def run(self, command: Sequence[str]) -> int:
        """Gives 0 if the launcher heard how the rank ended, else the rank's code."""
        # Until here a signal ended this process, and nothing had to be passed on.
        while (word := self._next()) != "start":
            if word:
                return 1
        self._listen()
        problem = ""
        try:
            # The launcher's own pipes (PMI_FD) have to reach the rank; but MPICH's to its stdin,
            # except rank 0's, never end.
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, close_fds=False, start_new_session=True
            )
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError | NotADirectoryError) else 126
            problem = f"cannot start {command[0]!r}: {error.strerror}"
        else:
            _send(self._link, str(child.pid))
            code = self._see_through(child.pid)
            _send(self._link, "ended")
        report = {"code": code, "problem": problem, "by_launcher": self._alone}
        _send(self._connection, json.dumps(report))
        while self._heard:
            word = self._next()
            if word == "leave":
                return 0
            self._heard = word not in ("gone", "alone")
        return code

    def _see_through(self, child: int) -> int:
        """Returns when the rank has ended, with its code; a signal's as 128 and its number."""
        kill_at = math.inf
        while not (status := os.waitpid(child, os.WNOHANG))[0]:
            now = time.monotonic()
            if now >= kill_at:
                _kill_group(child)
                kill_at = math.inf
            word = self._next(None if kill_at == math.inf else kill_at - now)
            if word.startswith("signal"):
                self._tell(child, int(word.split()[1]))
            elif word == "end":
                kill_at = 0.0
            elif word == "alone":
                self._alone = True
                kill_at = min(kill_at, time.monotonic() + _ABORT_SECONDS)
            elif word == "gone":
                self._heard = False
                self._tell(child, signal.SIGTERM)
                kill_at = min(kill_at, time.monotonic() + self._grace)
        _end_leftovers(child)
        code = os.waitstatus_to_exitcode(status[1])
        return code if code >= 0 else 128 - code

    def _tell(self, child: int, number: int) -> None:
        # Once, whoever says so: a second signal has a rank drop everything.
        if not self._told:
            self._told = True
            os.kill(child, number)

    def _listen(self) -> None:
        """Has signals to this process, and the rank's end, read where messages are read."""
        reading, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno())
        self._selector.register(reading, selectors.EVENT_READ, "")
        for number in (*PASSED, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)

    def _next(self, timeout: float | None = None) -> str:
        """The next of: what the launcher says, `signal N`, `gone` (it closed), `alone`.

        `alone` is said when the stand-in has died. Nothing at the timeout, or when the rank ended.
        """
        if not self._words:
            for key, _ in self._selector.select(timeout):
                self._words += self._read(cast(socket.socket, key.fileobj), key.data)
        return self._words.popleft() if self._words else ""

    def _read(self, source: socket.socket, at_end: str) -> list[str]:
        try:
            data = source.recv(4096)
        except OSError:  # reset, or given up after a vanished host
            data = b""
        if not data:
            self._selector.unregister(source)
            return [at_end]
        if source is self._connection:
            *lines, self._received = (self._received + data).split(b"\n")
            return [line.decode() for line in lines]
        return [f"signal {number}" for number in data if number in PASSED]


def _send(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody there any more, which reading tells
        connection.sendall(f"{line}\n".encode())


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _end_leftovers(group: int) -> None:
    """Gives what an ended rank started a moment to end by itself, and to clean up."""
    end = time.monotonic() + _LEFTOVER_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.02)
    _kill_group(group)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
