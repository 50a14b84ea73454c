"""When to save and what to keep, as small values. Pure: they see numbers, no files and no clock.

Saving: `policy.due(last, now)` looks at two `Moment`s, that of the last save and the present.
Keeping: `policy.keep(entries)` picks steps. Whoever deletes adds what is always kept, see `kept`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Moment:
    """A point of a run.

    Attributes:
        epoch: Whole epochs done.
        step: Optimizer steps done.
        time: In seconds, from any origin.
    """

    epoch: int
    step: int
    time: float


@dataclass(frozen=True)
class Entry:
    """A whole checkpoint, as far as keeping it is concerned.

    Attributes:
        step: Its step.
        metrics: By name.
    """

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Save(Protocol):
    """When to save."""

    def due(self, last: Moment, now: Moment) -> bool:
        """Whether a checkpoint is due `now`, the last one (or the start) having been `last`."""
        ...


class Keep(Protocol):
    """What to keep."""

    def keep(self, entries: Sequence[Entry]) -> set[int]:
        """The steps to keep of `entries`, which are whole and ascend by step."""
        ...


@dataclass(frozen=True)
class EveryEpochs:
    """A checkpoint whenever another `n` epochs are done: at epochs n, 2n, ..."""

    n: int = 1

    def __post_init__(self) -> None:
        _positive("EveryEpochs", self.n)

    def due(self, last: Moment, now: Moment) -> bool:
        """Whether a multiple of `n` lies in `(last, now]`."""
        return now.epoch // self.n > last.epoch // self.n


@dataclass(frozen=True)
class EverySteps:
    """A checkpoint whenever another `n` steps are done, also where steps come in larger jumps."""

    n: int

    def __post_init__(self) -> None:
        _positive("EverySteps", self.n)

    def due(self, last: Moment, now: Moment) -> bool:
        """Whether a multiple of `n` lies in `(last, now]`."""
        return now.step // self.n > last.step // self.n


@dataclass(frozen=True)
class EveryMinutes:
    """A checkpoint whenever the last one is `n` minutes old and a step was done since."""

    n: float

    def __post_init__(self) -> None:
        _positive("EveryMinutes", self.n)

    def due(self, last: Moment, now: Moment) -> bool:
        """Whether `n` minutes have passed; never twice at one step."""
        return now.step > last.step and now.time - last.time >= 60 * self.n


@dataclass(frozen=True)
class Last:
    """Keeps the `n` newest."""

    n: int = 1

    def __post_init__(self) -> None:
        _positive("Last", self.n)

    def keep(self, entries: Sequence[Entry]) -> set[int]:
        """The last `n` steps."""
        return {entry.step for entry in entries[-self.n :]}


@dataclass(frozen=True)
class Best:
    """Keeps the `n` best by a metric.

    Attributes:
        monitor: The metric's name, such as `val_loss`.
        mode: Whether less (`min`) or more (`max`) is better.
        n: How many.
    """

    monitor: str
    mode: Mode = "min"
    n: int = 1

    def __post_init__(self) -> None:
        _positive("Best", self.n)
        if self.mode not in ("min", "max"):
            raise ValueError(f"Best(mode={self.mode!r}) is not allowed: choose 'min' or 'max'.")

    def keep(self, entries: Sequence[Entry]) -> set[int]:
        """Of equals the earliest; NaN, and a checkpoint without the metric, is never best."""
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(
            (sign * value, entry.step)
            for entry in entries
            if not math.isnan(value := entry.metrics.get(self.monitor, math.nan))
        )
        return {step for _, step in ranked[: self.n]}


@dataclass(frozen=True)
class Multiples:
    """Keeps for good every checkpoint whose step is a multiple of `n`."""

    n: int

    def __post_init__(self) -> None:
        _positive("Multiples", self.n)

    def keep(self, entries: Sequence[Entry]) -> set[int]:
        """Steps n, 2n, ... as far as there are checkpoints of them."""
        return {entry.step for entry in entries if entry.step % self.n == 0}


def kept(policies: Iterable[Keep], entries: Iterable[Entry]) -> set[int]:
    """The steps that any policy keeps, the newest, and the best of each `Best`.

    Args:
        policies: None at all keep everything.
        entries: Whole checkpoints, in any order.
    """
    ordered = sorted(entries, key=lambda entry: entry.step)
    policies = list(policies)
    if not policies:
        return {entry.step for entry in ordered}
    steps = Last(1).keep(ordered)
    for policy in policies:
        steps |= policy.keep(ordered)
    return steps


def _positive(name: str, n: float) -> None:
    if not n > 0:
        raise ValueError(f"{name}(n={n!r}) is not allowed: n must be above 0.")
