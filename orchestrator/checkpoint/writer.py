"""Saves that run in the background, one after the other, from a bounded number of buffers."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - see _flush_at_exit
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

Buffer = TypeVar("Buffer")
Say = Callable[[str], None]


class Writer(Generic[Buffer]):
    """Fills a buffer in the caller's thread and writes it in its own.

    The writer owns the buffers: at most `in_flight` of them, one more with `"replace"`, made when
    first needed and used again, so that memory is bounded by their number whatever is submitted.
    Saves are written in the order they came in. The first error of the background is kept and
    raised once, by whichever of `raise_if_failed`, `submit` and `close` is called next; saves
    queued behind it are still tried. Does not communicate: it lives on the rank that writes.

    At the end of the interpreter, and of a `with` block, exceptions included, it is closed. The
    thread is a daemon: what has not ended by the deadline ends with the process.

    Args:
        make: Makes one buffer.
        in_flight: Saves accepted and not ended, 1 or more; 1 by default.
        when_busy: With that many in flight a new save waits for one to end (`"wait"`, the
            default). Or it takes the place of the last queued one (`"replace"`): one save more
            is accepted, and it is that one which a newer replaces, so that only filling the
            buffer holds up the caller.
        background: Whether to write in a thread. If not, `submit` writes before it returns, and
            raises what happens there.
        timeout: Seconds `close` waits by default, and so the end of the interpreter.
        say: Prints a line; called by `close` while it waits. To the standard error by default.

    Attributes:
        replaced: Number of saves that were never written since a newer one took their place.
    """

    def __init__(
        self,
        make: Callable[[], Buffer],
        *,
        in_flight: int = 1,
        when_busy: Literal["wait", "replace"] = "wait",
        background: bool = True,
        timeout: float = 300.0,
        say: Say | None = None,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight={in_flight} is not allowed: 1 or more.")
        if when_busy not in ("wait", "replace"):
            raise ValueError(f"when_busy={when_busy!r} is unknown. Allowed: 'wait', 'replace'.")
        self.replaced = 0
        self._make = make
        self._replaces = when_busy == "replace"
        self._limit = in_flight + self._replaces if background else 1
        self._background = background
        self._timeout = timeout
        self._say = say or _to_stderr
        self._change = threading.Condition()
        self._free: list[Buffer] = []
        self._made = 0
        self._queue: deque[tuple[Buffer, Callable[[Buffer], object]]] = deque()
        self._is_writing = False
        self._error: BaseException | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None
        _open.add(self)

    def prepare(self) -> None:
        """Makes all buffers now, so that no save waits for the making of one."""
        with self._change:
            while self._made < self._limit:
                self._free.append(self._make())
                self._made += 1

    def submit(
        self,
        fill: Callable[[Buffer], object],
        write: Callable[[Buffer], object],
        *,
        timeout: float | None = None,
    ) -> None:
        """Fills a buffer and has it written.

        Args:
            fill: Called with a buffer before this returns.
            write: Called with it later, in the writer's thread.
            timeout: Seconds to wait for a buffer; without end by default.

        Raises:
            RuntimeError: The writer is closed.
            TimeoutError: No buffer was free in time; nothing was filled.
            Exception: What `fill` raised, or an earlier save in the background.
        """
        buffer = self._acquire(None if timeout is None else time.monotonic() + timeout)
        try:
            fill(buffer)
            if not self._background:
                write(buffer)
        except BaseException:
            self._release(buffer)
            raise
        if self._background:
            self._enqueue(buffer, write)
        else:
            self._release(buffer)

    def raise_if_failed(self) -> None:
        """Raises the first error in the background since the last one raised; does not wait."""
        with self._change:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def flush(self, timeout: float | None = None, *, every: float = 10.0) -> None:
        """Waits for all saves; more may come.

        Args:
            timeout: Seconds to wait; the writer's own by default.
            every: Seconds between the lines it prints meanwhile.

        Raises:
            TimeoutError: The deadline has passed. Queued saves are dropped and the writer is
                closed; the one being written may still end while the process lives.
            Exception: The first error in the background.
        """
        began = time.monotonic()
        timeout = self._timeout if timeout is None else timeout
        while not self._settle(began + timeout, every):
            waited = time.monotonic() - began
            if waited >= timeout:
                raise TimeoutError(self._give_up(timeout)) from self._error
            self._say(
                f"Waiting for {self._unwritten()} to be written, {waited:.0f} s of at most "
                f"{timeout:.0f} s so far"
            )
        self.raise_if_failed()

    def close(self, timeout: float | None = None, *, every: float = 10.0) -> None:
        """Waits for all saves as `flush` does and ends the thread; a second call does nothing."""
        if self._is_closed:
            return
        try:
            self.flush(timeout, every=every)
        except Exception:
            self._end()
            raise
        self._end()

    def _end(self) -> None:
        """Ends the thread, unless it is still writing after the deadline."""
        with self._change:
            given_up, self._is_closed = self._is_closed, True
            self._change.notify_all()
        _open.discard(self)
        if self._thread is not None and not given_up:
            self._thread.join()

    def __enter__(self) -> Writer[Buffer]:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except Exception as own:
            if error is None:
                raise
            # The block's own error goes first.
            error.add_note(f"Checkpoints failed as well: {own!r}")

    def _acquire(self, deadline: float | None) -> Buffer:
        with self._change:
            while True:
                if self._is_closed:
                    raise RuntimeError("This checkpoint writer is closed; make a new one.")
                self.raise_if_failed()
                if self._free:
                    return self._free.pop()
                if self._made < self._limit:
                    buffer = self._make()
                    self._made += 1
                    return buffer
                if self._replaces and self._queue:
                    self.replaced += 1
                    return self._queue.pop()[0]
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"{self._unwritten()} not written in time; no buffer free.")
                self._change.wait(left)

    def _release(self, buffer: Buffer) -> None:
        with self._change:
            self._free.append(buffer)
            self._change.notify_all()

    def _enqueue(self, buffer: Buffer, write: Callable[[Buffer], object]) -> None:
        with self._change:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="checkpoint-writer", daemon=True
                )
                self._thread.start()
            self._queue.append((buffer, write))
            self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                buffer, write = self._queue.popleft()
                self._is_writing = True
            error = None
            try:
                write(buffer)
            except BaseException as raised:  # noqa: BLE001 - raised in the caller's thread
                error = raised
            with self._change:
                self._error = self._error or error
                self._is_writing = False
                self._free.append(buffer)
                self._change.notify_all()

    def _settle(self, deadline: float, every: float) -> bool:
        """Waits for all to be written, `every` seconds at most and not beyond the deadline."""
        with self._change:
            return self._change.wait_for(
                lambda: not (self._queue or self._is_writing),
                max(0.0, min(every, deadline - time.monotonic())),
            )

    def _unwritten(self) -> str:
        number = len(self._queue) + self._is_writing
        return "1 checkpoint" if number == 1 else f"{number} checkpoints"

    def _give_up(self, timeout: float) -> str:
        with self._change:
            text = f"{self._unwritten()} not written within {timeout:g} s"
            self._queue.clear()
            self._is_closed = True
            self._change.notify_all()
        _open.discard(self)
        return f"{text}; whatever the last of them left is not a checkpoint until it is committed."


_open: weakref.WeakSet[Writer] = weakref.WeakSet()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _flush_at_exit() -> None:
    for writer in list(_open):
        try:
            writer.close()
        except Exception:  # noqa: BLE001 - nobody is left to catch it
            traceback.print_exc()


# Once atexit's own functions run, no thread pool takes work any more, and s3fs and the hashing
# need one. What is registered here runs earlier, last to first: before the pools' own, which
# importing them registered.
getattr(threading, "_register_atexit", atexit.register)(_flush_at_exit)
