"""`EarlyStopping` on many ranks."""

from __future__ import annotations

from typing import Any

import keras

from orchestrator import decisions, weights
from orchestrator.callbacks.monitor import Missing, Monitor


class EarlyStopping(Monitor, keras.callbacks.EarlyStopping):
    """Stops training on all ranks at one epoch; Keras's parameters, defaults and attributes.

    The decision is made on every rank from the same global logs. With `restore_best_weights` the
    best epoch's weights are kept on rank 0 alone, and at the end of training broadcast to every
    rank (one message for each 64 MiB), whoever stopped it. Otherwise it does not communicate.

    Unlike Keras's, a NaN is never an improvement, and any finite value improves on it. With
    `missing="error"` a metric that is not there is a `SettingError` on every rank; `"warn"`, the
    default, warns as Keras does.

    Attributes:
        restored_epoch: The epoch (from 0) whose weights were restored; `None` until then.
    """

    restored_epoch: int | None = None

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
        *,
        missing: Missing = "warn",
    ) -> None:
        super().__init__(
            monitor,
            min_delta,
            patience,
            verbose,
            mode,
            baseline,
            restore_best_weights,
            start_from_epoch,
        )
        self._if_missing(missing)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts afresh, as Keras's does."""
        super().on_train_begin(logs)
        self._state = decisions.StopState()
        self.restored_epoch = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Decides; on rank 0 copies the weights of a best epoch to host memory."""
        self._check_monitor(logs or {})
        improvement = self._improvement()
        monitored = self.get_monitor_value(logs)
        if monitored is None:
            return
        current = self._number(monitored)
        rule = decisions.StopRule(improvement, self.patience, self.baseline, self.start_from_epoch)
        decision = decisions.early_stopping(rule, self._state, epoch, current)
        self._adopt(decision.state)
        if decision.keep and self.restore_best_weights and self._runtime.is_root:
            self.best_weights = self.model.get_weights()
        if decision.improved:
            self._emit("best", epoch, monitor=self.monitor, value=current)
        if decision.stop:
            self.model.stop_training = True
            self._emit(
                "stop",
                epoch,
                monitor=self.monitor,
                value=current,
                best=self.best,
                best_epoch=self.best_epoch,
                patience=self.patience,
            )

    def _adopt(self, state: decisions.StopState) -> None:
        """Shows the state under the names Keras gives it."""
        self._state = state
        self.best, self.wait, self.stopped_epoch = state.best, state.wait, state.stopped_epoch
        self.best_epoch = state.best_epoch or 0

    def get_state(self) -> dict[str, Any]:
        """What it remembers, on rank 0 with the best weights."""
        return {"state": self._state._asdict(), "best_weights": self.best_weights}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate.

        Where the best weights were not kept, the next epoch's are, as in Keras that has none.
        """
        decided, kept = decisions.StopState(**state["state"]), state["best_weights"]
        if self.restore_best_weights and kept is None:
            decided = decided._replace(best_epoch=None)
        self._adopt(decided)
        keeps = self.restore_best_weights and self._runtime.is_root
        self.best_weights = kept if keeps else None

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcasts the best weights to every rank."""
        if self.stopped_epoch > 0:
            self._say(f"Epoch {self.stopped_epoch + 1}: early stopping")
        if not self.restore_best_weights or self._state.best_epoch is None:
            return
        self._say(f"Restoring model weights from the end of the best epoch: {self.best_epoch + 1}.")
        # Ranks but 0 keep none, and send in what has the shapes.
        mine = self.best_weights or self.model.get_weights()
        self.model.set_weights(weights.broadcast_arrays(self._runtime.communicator, mine))
        self.restored_epoch = self.best_epoch
        self._emit("restore", self.best_epoch, monitor=self.monitor, value=self.best)
