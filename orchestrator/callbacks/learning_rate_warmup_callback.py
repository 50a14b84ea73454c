"""`LearningRateWarmupCallback`, as Horovod's scripts know it."""

from __future__ import annotations

from typing import Any

from orchestrator import decisions
from orchestrator import runtime as runtimes
from orchestrator.callbacks.learning_rate_schedule_callback import LearningRateScheduleCallback


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the rate from `initial_lr / size` to `initial_lr`, batch by batch; as Horovod's.

    `initial_lr` is the rate that is reached, so one scaled for the ranks already; the last batch of
    the last of its epochs has it. `LearningRateWarmup` begins with the optimizer's own rate.

    On all ranks; it does not communicate.

    Args:
        initial_lr: The rate that is reached.
        warmup_epochs: Epochs it takes; 5 by default.
        momentum_correction: As `LearningRateScheduleCallback`'s.
        steps_per_epoch: As `LearningRateScheduleCallback`'s.
        verbose: 1 says when it is done; 0, the default, does not.
    """

    def __init__(
        self,
        initial_lr: float | None,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            initial_lr,
            self._multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.warmup_epochs, self.verbose = warmup_epochs, verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the rate into the logs, and says when the warm-up is over."""
        super().on_epoch_end(epoch, logs)
        if self.end_epoch is not None and epoch == self.end_epoch - 1:
            rate = self._base("") * self.multiplier(self._at(epoch + 1, -1))
            self._say(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")

    def _at(self, epoch: int, batch: int) -> float:
        return super()._at(epoch, batch + 1)  # as in Horovod: round numbers at epoch ends

    def _multiplier(self, epoch: float) -> float:
        ranks = runtimes.current().replicas
        return decisions.warmed_up(1 / ranks, 1.0, self.warmup_epochs, epoch)
