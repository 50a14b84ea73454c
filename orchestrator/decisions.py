"""When to stop, to reduce the learning rate, to save, who is slow: pure functions.

Nothing here knows Keras, the network or the clock. Each function maps (rule, state, value) to a
decision with the new state; ranks that hold the same state and see the same value decide alike.
The rules are those of Keras 3.15's callbacks, but for NaN: it is never an improvement, and any
finite value improves on it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Improvement:
    """Whether one value of a monitored metric is better than another.

    Attributes:
        mode: `"min"` if smaller is better, `"max"` if larger is.
        min_delta: A change of at most this much, 0 or more, is no improvement.
    """

    mode: Mode
    min_delta: float = 0.0

    def __call__(self, current: float, reference: float | None) -> bool:
        """True if `current` improves on `reference`; `None` or NaN is improved on by any number."""
        if math.isnan(current):
            return False
        if reference is None or math.isnan(reference):
            return True
        if self.mode == "min":
            return _single(current + self.min_delta) < _single(reference)
        return _single(current - self.min_delta) > _single(reference)


def _single(value: float) -> float:
    """The nearest float32, as Keras compares: an accuracy of 6 in 10 is no more than 0.6."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


@dataclass(frozen=True)
class StopRule:
    """The parameters of early stopping, with Keras's meanings (epochs are counted from 0)."""

    improvement: Improvement
    patience: int = 0
    baseline: float | None = None
    start_from_epoch: int = 0


class StopState(NamedTuple):
    """What early stopping remembers from epoch to epoch.

    `best_epoch` is `None` until an epoch has been looked at; from then on it is the epoch whose
    weights a restore brings back.
    """

    best: float | None = None
    best_epoch: int | None = None
    wait: int = 0
    stopped_epoch: int = 0


class StopDecision(NamedTuple):
    """`keep`: this epoch's weights are the best so far; `stop`: training ends here."""

    state: StopState
    keep: bool
    improved: bool
    stop: bool


def early_stopping(rule: StopRule, state: StopState, epoch: int, current: float) -> StopDecision:
    """One epoch of early stopping, as `keras.callbacks.EarlyStopping.on_epoch_end` decides it."""
    if epoch < rule.start_from_epoch:
        return StopDecision(state, keep=False, improved=False, stop=False)
    first = state.best_epoch is None
    wait = state.wait + 1
    if rule.improvement(current, state.best):
        beats_baseline = rule.baseline is None or rule.improvement(current, rule.baseline)
        state = state._replace(best=current, best_epoch=epoch, wait=0 if beats_baseline else wait)
        return StopDecision(state, keep=True, improved=True, stop=False)
    state = state._replace(wait=wait, best_epoch=epoch if first else state.best_epoch)
    stop = wait >= rule.patience and epoch > 0
    if stop:
        state = state._replace(stopped_epoch=epoch)
    return StopDecision(state, keep=first, improved=False, stop=stop)


@dataclass(frozen=True)
class PlateauRule:
    """The parameters of learning-rate reduction, with Keras's meanings."""

    improvement: Improvement
    factor: float = 0.1
    patience: int = 10
    cooldown: int = 0
    min_lr: float = 0.0

    def reduced(self, learning_rate: float) -> float | None:
        """The rate after a cut, or `None` where it is at `min_lr` already."""
        # A rate read back from a float32 variable may lie a rounding above `min_lr`.
        if learning_rate <= self.min_lr or math.isclose(learning_rate, self.min_lr, rel_tol=1e-6):
            return None
        return max(learning_rate * self.factor, self.min_lr)


class PlateauState(NamedTuple):
    """What learning-rate reduction remembers from epoch to epoch."""

    best: float | None = None
    wait: int = 0
    cooldown_counter: int = 0


class PlateauDecision(NamedTuple):
    """`reduce`: the learning rate is cut now."""

    state: PlateauState
    reduce: bool


def plateau(
    rule: PlateauRule, state: PlateauState, current: float, reducible: bool
) -> PlateauDecision:
    """One epoch of learning-rate reduction.

    Args:
        rule: The parameters.
        state: What the epochs before left.
        current: The monitored value of this epoch.
        reducible: Whether any learning rate is still above `min_lr`. As in Keras, a cut that
            changes nothing resets neither the wait nor the cooldown.
    """
    if state.cooldown_counter > 0:
        state = state._replace(cooldown_counter=state.cooldown_counter - 1, wait=0)
    if rule.improvement(current, state.best):
        return PlateauDecision(state._replace(best=current, wait=0), reduce=False)
    if state.cooldown_counter > 0:
        return PlateauDecision(state, reduce=False)
    state = state._replace(wait=state.wait + 1)
    if state.wait >= rule.patience and reducible:
        state = state._replace(cooldown_counter=rule.cooldown, wait=0)
        return PlateauDecision(state, reduce=True)
    return PlateauDecision(state, reduce=False)


class BatchCount(NamedTuple):
    """Batches seen since the last save, for a save every so many batches."""

    since_save: int = 0
    last_batch: int | None = None


def batches_due(state: BatchCount, batch: int, every: int) -> tuple[BatchCount, bool]:
    """Counts up to `batch` (from 0 in each epoch); true once `every` batches have gone by.

    With `steps_per_execution` the numbers of the batches skip; a number that does not rise
    starts a new epoch.
    """
    last = state.last_batch
    seen = batch + 1 if last is None or batch <= last else batch - last
    since = state.since_save + seen
    due = since >= every
    return BatchCount(0 if due else since, batch), due


Scaling = Literal["linear", "sqrt"]
SCALINGS = ("linear", "sqrt")


def scaled(learning_rate: float, factor: float, rule: Scaling) -> float:
    """A learning rate for a batch `factor` times as large."""
    return learning_rate * (factor if rule == "linear" else math.sqrt(factor))


def warmed_up(start: float, end: float, epochs: float, at: float) -> float:
    """From `start` to `end` in a straight line of `epochs`, and then `end`; `at` has fractions."""
    return end if at >= epochs else start + (end - start) * at / epochs


def slow_ranks(own: Sequence[float], total: float, factor: float) -> dict[int, float]:
    """The ranks that hold the others up.

    Args:
        own: Seconds a step of each rank's own work.
        total: Seconds a step takes.
        factor: Slow is more than so many times the median of the other ranks; above 1. What
            costs less than a tenth of the step or 2 ms is not, nor is less than half of what the
            slowest takes: nobody waits for that rank.

    Returns:
        By rank, how many times that median it took.
    """
    slow = {}
    least = max(total / 10, _NOISE)
    for rank, mine in enumerate(own):
        others = statistics.median([*own[:rank], *own[rank + 1 :]]) if len(own) > 1 else mine
        if mine > factor * others and mine - others > least and mine > max(own) / 2:
            slow[rank] = mine / others if others > 0 else math.inf
    return slow


_NOISE = 0.002  # seconds: ranks that share cores wake up at different times
