"""One exit code for all ranks, from how each of them ended."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import NamedTuple

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start me again


class Ended(NamedTuple):
    """How a rank ended: its exit code (of a signal, 128 and its number), and in words."""

    rank: int
    code: int
    how: str


class Outcome(NamedTuple):
    """How a job ended: one code for all ranks; unless 0, one line of why and whose it is."""

    code: int
    reason: str
    rank: int | None = None


def verdict(ended: Sequence[Ended]) -> Outcome:
    """The outcome of ranks in the order in which they ended.

    0 if all are 0; else the code of the first that failed, since what comes after it is often its
    consequence: a rank that is preempted while it starts leaves others that wait for it.
    """
    first = next((one for one in ended if one.code), None)
    if first is None:
        return Outcome(0, "")
    if first.code == PREEMPTED:
        said = f"rank {first.rank} ended first, with {PREEMPTED}: preempted"
        return Outcome(PREEMPTED, said, first.rank)
    return Outcome(first.code, f"rank {first.rank} {first.how}, the first to fail", first.rank)


def in_words(code: int) -> str:
    """`ended with 3`, `ended by SIGKILL (137)`."""
    try:
        return f"ended by {signal.Signals(code - 128).name} ({code})"
    except ValueError:
        return f"ended with {code}"
