"""`LearningRateScheduler` on many ranks."""

from __future__ import annotations

from typing import Any

import keras

from orchestrator.callbacks import rates
from orchestrator.callbacks.rank_aware import RankAware


class LearningRateScheduler(RankAware, keras.callbacks.LearningRateScheduler):
    """Sets the learning rate at the beginning of each epoch; Keras's parameters and defaults.

    On all ranks. `schedule` is asked on rank 0 alone, and its answer shared (one small broadcast
    an epoch and optimizer): it may be random, or read a file. An epoch that a resumed run goes on
    in the middle of keeps its rate: `schedule` has been asked for it before.

    Raises:
        ValueError: On rank 0, `RankError` on the others: `schedule` gives no float.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts afresh."""
        self._epoch: int | None = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Asks for the rate and sets it."""
        if epoch == getattr(self, "_epoch", None):
            return
        self._epoch = epoch
        for name, optimizer in rates.optimizers(self.model):
            rate = self._update_optimizer_lr(optimizer, epoch)
            what = "" if name == "learning_rate" else f"{optimizer.name} "
            self._say(
                f"\nEpoch {epoch + 1}: LearningRateScheduler setting {what}learning rate to {rate}."
            )

    def _update_optimizer_lr(self, optimizer: Any, epoch: int) -> float:
        usual = super()._update_optimizer_lr
        rate = self._runtime.on_root(lambda: usual(optimizer, epoch))
        optimizer.learning_rate = rate
        return rate

    def get_state(self) -> dict[str, Any]:
        """The last epoch that it was asked for; the rate is the optimizer's."""
        return {"epoch": self._epoch}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate."""
        self._epoch = state["epoch"]
