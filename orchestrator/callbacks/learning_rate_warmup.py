"""`LearningRateWarmup`: from one process's learning rate to that of the global batch."""

from __future__ import annotations

from typing import Any

from orchestrator import decisions
from orchestrator.callbacks import rates
from orchestrator.callbacks.learning_rate_schedule_callback import LearningRateScheduleCallback
from orchestrator.config import SettingError


class LearningRateWarmup(LearningRateScheduleCallback):
    """Raises the rate linearly from the optimizer's own to `factor` times it, batch by batch.

    The gradual warm-up of Goyal et al. 2017 (arXiv:1706.02677, section 2.2), with their momentum
    correction. On all ranks; it does not communicate. It sets the rate in its epochs alone, so
    that a `LearningRateScheduler`, a `LearningRateScheduleCallback` or `ReduceLROnPlateau` in the
    same list takes over from there. With a `MultiOptimizer` each rate is raised from its own.

    Args:
        epochs: Epochs it takes, 5 by default.
        factor: What the rate is multiplied by in the end; `None`, the default, for the number of
            ranks (or replicas), as the linear scaling rule has it. `math.sqrt(size)` for the other.
        momentum_correction: Whether the momentum of SGD and RMSprop is scaled with each change;
            true by default.
        steps_per_epoch: Batches in an epoch, where `fit` cannot tell.
        verbose: 1 says when it is done; 0, the default, does not.

    Raises:
        SettingError: `epochs` or `factor` is not above 0; or batches in an epoch are not known.
        TypeError: The optimizer has a `LearningRateSchedule`: build the warm-up into that
            (`keras.optimizers.schedules.CosineDecay` has `warmup_target`).
    """

    def __init__(
        self,
        epochs: int = 5,
        *,
        factor: float | None = None,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        if epochs < 1 or (factor is not None and factor <= 0):
            raise SettingError(
                f"LearningRateWarmup(epochs={epochs}, factor={factor}) is not allowed: epochs is a "
                "whole number from 1, and factor a number above 0 or None for the ranks' number."
            )
        super().__init__(
            1.0,
            self._multiplier,
            end_epoch=epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.epochs, self.factor, self.verbose = epochs, factor, verbose

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Takes the rates to begin with from the optimizer."""
        self._bases = rates.learning_rates(self.model)
        self._done = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the rate that is reached, once the warm-up is over."""
        super().on_epoch_begin(epoch, logs)
        if epoch == self.epochs and not self._done:
            self._done = True
            self._set(epoch)
            reached = ", ".join(f"{rate:g}" for rate in rates.learning_rates(self.model).values())
            self._say(f"\nEpoch {epoch + 1}: learning rate warmed up to {reached}.")

    def get_state(self) -> dict[str, Any]:
        """The rates it began with."""
        return {"bases": self._bases, "done": self._done}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate."""
        self._bases, self._done = state["bases"], state["done"]

    def _base(self, name: str) -> float:
        return self._bases[name]

    def _multiplier(self, epoch: float) -> float:
        factor = self._runtime.replicas if self.factor is None else self.factor
        return decisions.warmed_up(1.0, factor, self.epochs, epoch)
