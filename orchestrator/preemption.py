"""Notice that this process is about to be taken away: a signal, a file, a URL of the cloud's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from orchestrator import storage
from orchestrator.launching.outcome import PREEMPTED

EXIT_CODE = PREEMPTED
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 5.0
SAME_NOTICE_SECONDS = 2.0
_HTTP = ("http://", "https://")
# What metadata servers answer as long as there is nothing to say.
_NOTHING = ("", "false", "none")


class Preempted(SystemExit):
    """Training was stopped for another start, and a checkpoint of this moment is committed.

    Raised on all ranks. Uncaught it ends the process with 75.

    Args:
        message: Why, and what is committed.
        epoch: Whole epochs done.
        step: Optimizer steps done.
    """

    def __init__(self, message: str, *, epoch: int, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.message, self.epoch, self.step = message, epoch, step

    def __str__(self) -> str:
        return self.message


class Watch:
    """Waits for a notice while the `with` block runs; does not communicate.

    SIGTERM and SIGUSR1 are heard in a thread, also while the main thread is in a collective. From
    the first notice on there is a deadline: past it, or at a second signal, the process ends at
    once with 128 and the signal's number, whatever it was doing. Within two seconds a signal is
    the first one's again: where both a scheduler and the launcher pass it on.

    Args:
        heard: Called once, in another thread, with what the notice was.
        grace: Seconds from the notice to the end of the process.
        notice: A file or URL whose being there is a notice too. Of `http` and `https` it is an
            answer 200 that says neither nothing nor FALSE nor NONE, as of the metadata servers of
            Google (`.../instance/preempted`) and Amazon (`.../spot/instance-action`).
        every: Seconds between two looks at it.
    """

    def __init__(
        self,
        heard: Callable[[str], None],
        *,
        grace: float,
        notice: str | None = None,
        every: float = POLL_SECONDS,
    ) -> None:
        self._heard = heard
        self._grace = grace
        self._notice = notice
        self._every = every
        self._ended = threading.Event()
        self._first: float | None = None
        self._is_committed = False
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._listen()
        if self._notice is not None:
            threading.Thread(target=self._poll, name="preemption-notice", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._timer is not None:
            self._timer.cancel()
        self._stack.close()

    def committed(self) -> None:
        """What there was to save is saved: signals mean nothing more, and an end in time is 75.

        A launcher that sees one rank end sends the others a signal, on their way out.
        """
        self._is_committed = True

    def _listen(self) -> None:
        # Python calls its own handlers between two of the main thread's instructions, and a
        # collective is one instruction. The byte written at once wakes a thread.
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        self._stack.callback(reading.close)
        self._stack.callback(writing.close)
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, before)
        for number in SIGNALS:
            self._stack.callback(signal.signal, number, signal.signal(number, _nothing))
        thread = threading.Thread(
            target=self._hear, args=(reading,), name="preemption-signals", daemon=True
        )
        thread.start()

    def _hear(self, reading: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while number := reading.recv(1):
                if number[0] in SIGNALS and not self._ended.is_set():
                    self._receive(number[0])

    def _receive(self, number: int) -> None:
        if self._is_committed:
            return
        now = time.monotonic()
        if self._first is not None and now - self._first < SAME_NOTICE_SECONDS:
            return
        if self._first is not None:
            _end(128 + number, f"a second signal, {signal.Signals(number).name}")
        self._first = now
        self._tell(signal.Signals(number).name, number)

    def _tell(self, what: str, number: int = signal.SIGTERM) -> None:
        with self._lock:
            if self._timer is not None:
                return
            self._timer = threading.Timer(self._grace, self._out_of_time, (what, number))
            self._timer.daemon = True
        self._heard(what)  # first: the present step may just be reading its flags
        self._timer.start()

    def _out_of_time(self, what: str, number: int) -> None:
        if self._is_committed:
            os._exit(EXIT_CODE)
        _end(128 + number, f"{what} {self._grace:g} s ago, and no checkpoint committed since")

    def _poll(self) -> None:
        while not is_there(self._notice or ""):
            if self._ended.wait(self._every):
                return
        self._tell(f"{self._notice} is there")


def check_notice(notice: str) -> None:
    """Raises `SettingError` where a notice is of a kind that nothing here can look at."""
    if not notice.startswith(_HTTP):
        storage.resolve(notice)


def is_there(notice: str) -> bool:
    """Whether a notice is there; not, where that cannot be found out."""
    try:
        if notice.startswith(_HTTP):
            return _answer(notice).strip().lower() not in _NOTHING
        fs, path = storage.resolve(notice)
        fs.invalidate_cache()
        return fs.exists(path)
    except Exception:  # noqa: BLE001 - a client's own errors; the next look may find out
        return False


def _answer(url: str) -> str:
    # Google's server answers nobody without this header; others do not mind it.
    headers = {"Metadata-Flavor": "Google"}
    try:
        return _request(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
    # Amazon's wants a token of its own first (IMDSv2).
    asking = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _request(urllib.parse.urljoin(url, "/latest/api/token"), asking, "PUT")
    return _request(url, {"X-aws-ec2-metadata-token": token})


def _request(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=2) as answer:
        return answer.read(4096).decode()


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def _end(code: int, reason: str) -> None:
    print(f"Ended at once: {reason}.", file=sys.stderr, flush=True)
    time.sleep(0.1)  # the launcher forwards what was printed
    os._exit(code)
