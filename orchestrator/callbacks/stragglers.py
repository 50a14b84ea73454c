"""Which ranks hold the others up, and by what."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.decisions import slow_ranks
from orchestrator.times import Spent


class Stragglers(RankAware):
    """Names ranks that are slower than the others.

    On all ranks. Each adds up its seconds by itself: of its own work (the training step, its data,
    callbacks, validation), and of waiting for the others. After ten steps, and then about every
    `seconds`, after as many steps on every rank, they are told to all (one small gather). A rank
    with more than `factor` times the median of the others' own work is said, with what its time
    went into, and recorded in an event of kind `slow`; when it no longer is, that is said. Each
    epoch an event of kind `times` keeps all ranks' seconds a step. With one rank it does nothing.

    `train()` adds one with these defaults where the settings have none.

    Args:
        factor: How many times the median of the other ranks is slow; above 1, 2.0 by default.
        seconds: Between two comparisons, about; 30 by default.
    """

    FIRST = 10  # steps; the first one compiles, and does not count

    def __init__(self, factor: float = 2.0, seconds: float = 30.0) -> None:
        super().__init__()
        if not factor > 1 or not seconds > 0:
            raise ValueError(
                f"Stragglers(factor={factor}, seconds={seconds}) is not allowed: factor is above "
                "1, seconds above 0."
            )
        self.factor = factor
        self.seconds = seconds
        self._slow: dict[int, float] = {}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts afresh."""
        self._slow = {}
        self._epoch, self._steps, self._next = 0, 0, self.FIRST
        self._of_epoch: list[list[Spent]] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keeps the epoch, for what it says."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Compares, after as many steps on all ranks."""
        self._steps += 1
        if self._runtime.size == 1:
            return
        if self._steps == 1:
            self._runtime.times.take()
        elif self._steps >= self._next:
            self._compare()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Records the epoch's times, where they were compared in it."""
        if self._of_epoch:
            ranks = [_sum(spent) for spent in zip(*self._of_epoch, strict=True)]
            self._emit("times", epoch, steps=ranks[0].steps, **_a_step(ranks))
            self._of_epoch = []

    def _compare(self) -> None:
        """By all ranks, after the same step."""
        mine = self._runtime.times.take()
        gathered = self._runtime.communicator.allgather_object(tuple(mine))
        ranks = [Spent(*one) for one in gathered]
        self._of_epoch.append(ranks)
        longest = max(one.total for one in ranks)
        a_step = longest / max(mine.steps, 1)
        self._next = self._steps + max(self.FIRST, math.ceil(self.seconds / max(a_step, 1e-6)))
        numbers = _a_step(ranks)
        self._tell(numbers, slow_ranks(numbers["own"], a_step, self.factor))

    def _tell(self, numbers: dict[str, Any], slow: dict[int, float]) -> None:
        """Says who has become slow, and who no longer is."""
        for rank in slow.keys() - self._slow.keys():
            times = {name: numbers[name][rank] for name in ("own", "data", "compute", "between")}
            self._emit("slow", self._epoch, rank, times_others=slow[rank], **times)
            self._runtime.say(_explain(rank, slow[rank], times))
        for rank in self._slow.keys() - slow.keys():
            self._runtime.say(f"Rank {rank} is no longer slower than the others.")
        self._slow = slow


def _sum(spent: tuple[Spent, ...]) -> Spent:
    return Spent(*map(sum, zip(*spent, strict=True)))


def _a_step(ranks: list[Spent]) -> dict[str, Any]:
    """Seconds a step, by rank."""
    parts = {
        "total": lambda one: one.total,
        "own": lambda one: one.own,
        "data": lambda one: one.data,
        "compute": lambda one: one.inside - one.data - one.reduction,
        "between": lambda one: one.between,
        "reduction": lambda one: one.reduction,
        "waiting": lambda one: one.waiting,
    }
    return {
        name: [round(part(one) / max(one.steps, 1), 6) for one in ranks]
        for name, part in parts.items()
    }


def _explain(rank: int, times: float, seconds: dict[str, float]) -> str:
    milliseconds = {name: f"{1000 * value:.3g} ms" for name, value in seconds.items()}
    return (
        f"Rank {rank} is slow: its own work takes {times:.1f} times the median of the other "
        f"ranks', {milliseconds['own']} a step: {milliseconds['data']} waiting for data, "
        f"{milliseconds['compute']} in the step, {milliseconds['between']} between steps "
        "(callbacks, validation, saving). All ranks wait for it."
    )
