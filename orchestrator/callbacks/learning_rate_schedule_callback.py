"""`LearningRateScheduleCallback`, as Horovod's scripts know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.callbacks import rates
from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.config import SettingError


class LearningRateScheduleCallback(RankAware):
    """Multiplies an initial learning rate, in some epochs of a training; Horovod's parameters.

    On all ranks, whose `multiplier` must say the same; it does not communicate. Several may follow
    one another in their epochs. The rate is in the logs of each epoch, as `learning_rate`. With a
    `MultiOptimizer` all its rates are set from `initial_lr`.

    Args:
        initial_lr: The rate that is multiplied.
        multiplier: A number, or a function of the epoch (from 0) that gives one. Without
            `staircase` the epoch has fractions: batches done of those in an epoch.
        start_epoch: The first epoch it acts in; 0 by default.
        end_epoch: The first one it no longer acts in; `None`, the default, for no end.
        staircase: Whether the rate is set once an epoch (the default), or at each batch.
        momentum_correction: Whether what has gathered in the momentum of SGD and RMSprop is scaled
            with each change (Goyal et al. 2017, arXiv:1706.02677); true by default.
        steps_per_epoch: Batches in an epoch, where `fit` cannot tell.

    Raises:
        SettingError: No `initial_lr`; or batches in an epoch are needed and not known.
        TypeError: The optimizer has a `LearningRateSchedule`.
    """

    def __init__(
        self,
        initial_lr: float | None,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: float | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise SettingError(
                f"{type(self).__name__} needs initial_lr, the learning rate that it multiplies."
            )
        constant = 1.0 if callable(multiplier) else float(multiplier)
        self.initial_lr: float | None = initial_lr
        self.multiplier: Callable[[float], float] = (
            multiplier if callable(multiplier) else lambda epoch: constant
        )
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.staircase = staircase or not callable(multiplier)
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keeps the epoch."""
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the rate, if this is one of its epochs."""
        epoch = self.current_epoch
        if epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if not self.staircase:
            self._set(self._at(epoch, batch))
        elif batch == 0:
            self._set(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the rate into the logs."""
        if logs is not None:
            logs.update(rates.learning_rates(self.model))

    def _set(self, epoch: float) -> None:
        multiplier = self.multiplier(epoch)
        for name, optimizer in rates.optimizers(self.model):
            rate = self._base(name) * multiplier
            rates.set_learning_rate(optimizer, rate, self.momentum_correction)

    def _base(self, name: str) -> float:
        """The rate that is multiplied, of one optimizer."""
        return float(self.initial_lr or 0.0)

    def _at(self, epoch: int, batch: int) -> float:
        """The epochs gone by, with their fraction."""
        return epoch + batch / self._steps_per_epoch()

    def _steps_per_epoch(self) -> int:
        steps = self.steps_per_epoch or (self.params or {}).get("steps")
        if not steps:
            raise SettingError(
                f"{type(self).__name__} changes the learning rate within epochs, and how many "
                "batches an epoch has is not known before its end: give steps_per_epoch."
            )
        return int(steps)
