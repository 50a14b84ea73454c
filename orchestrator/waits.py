"""Where this rank stands: what it waits for, since when, at which step. Written by it alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

# Until a rank's first training step has been made everyone compiles, opens files and reads
# checkpoints, and so it is again in the first step of each function that Keras makes.
START = 3
# What rank 0 does for all (saving, opening) has time-outs of its own, which this is to exceed.
ROOT_SECONDS = 900.0
# The calls of the training function, whose gradients are summed inside it.
STEP, FIRST_STEP = STEPS = ("a training step", "the first training step")


class Wait(NamedTuple):
    """Waiting for other ranks: in what, since when (monotonic), and how many seconds at most."""

    call: str
    since: float
    limit: float


class Waits:
    """One rank's record of its waiting, for `deadline.Deadline` to look at from a thread.

    Entering and leaving a wait is a few assignments and a reading of the clock.

    Args:
        timeout: Seconds that a wait for other ranks may last.
        clock: Monotonic seconds.

    Attributes:
        current: What this rank waits in; `None` in its own code.
        last: The last thing it waited in.
        moved: When it last began or ended a wait.
        step: Training steps made, of the optimizer's count; `None` before the first `fit`.
        started: Whether a training step has been made in this process.
        seconds: Spent so far, by what it waited in.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout = timeout
        self.clock = clock
        self.current: Wait | None = None
        self.last = "nothing"
        self.moved = clock()
        self.step: int | None = None
        self.started = False
        self.seconds: dict[str, float] = {}
        self._for_root = 0

    def on(self, call: str, *, first: bool = False) -> _In:
        """A context in which this rank waits for the others; `first` where they compile, too."""
        limit = self.timeout if self.started and not first else START * self.timeout
        if self._for_root:
            limit = max(START * self.timeout, ROOT_SECONDS)
        return _In(self, call, limit)

    def for_root(self) -> _ForRoot:
        """A context in which what is waited for is something that rank 0 does."""
        return _ForRoot(self)

    def stepped(self, steps: int) -> None:
        """Counts training steps."""
        self.started = True
        self.step = (self.step or 0) + steps


class _In:
    """A class, not a generator: it is entered in every training step."""

    __slots__ = ("_before", "_call", "_limit", "_waits")

    def __init__(self, waits: Waits, call: str, limit: float) -> None:
        self._waits, self._call, self._limit = waits, call, limit
        self._before: Wait | None = None

    def __enter__(self) -> None:
        waits = self._waits
        self._before = waits.current
        waits.moved = now = waits.clock()
        waits.current = Wait(self._call, now, self._limit)

    def __exit__(self, kind: Any, error: Any, traceback: TracebackType | None) -> None:
        waits = self._waits
        wait, waits.current, waits.last = waits.current, self._before, self._call
        waits.moved = now = waits.clock()
        if wait is not None and self._before is None:
            waits.seconds[self._call] = waits.seconds.get(self._call, 0.0) + now - wait.since


class _ForRoot:
    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def __enter__(self) -> None:
        self._waits._for_root += 1

    def __exit__(self, kind: Any, error: Any, traceback: TracebackType | None) -> None:
        self._waits._for_root -= 1


def of(communicator: Any) -> Waits | None:
    """The record behind a communicator; `None` where nobody watches."""
    return getattr(communicator, "waits", None)
