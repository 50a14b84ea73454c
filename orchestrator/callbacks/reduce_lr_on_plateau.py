"""`ReduceLROnPlateau` on many ranks."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from orchestrator import decisions
from orchestrator.callbacks import rates as rates_of
from orchestrator.callbacks.monitor import Missing, Monitor, available
from orchestrator.callbacks.rates import learning_rate


class ReduceLROnPlateau(Monitor, keras.callbacks.ReduceLROnPlateau):
    """Cuts the learning rate on all ranks at one epoch; Keras's parameters and defaults.

    The decision is made on every rank from the same global logs; it does not communicate.
    Unlike Keras's, a NaN is never an improvement, and any finite value improves on it. With
    `missing="error"` a metric that is not there is a `SettingError` on every rank; `"warn"`, the
    default, warns as Keras does.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
        *,
        missing: Missing = "warn",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            monitor, factor, patience, verbose, mode, min_delta, cooldown, min_lr, **kwargs
        )
        self._if_missing(missing)

    def _reset(self) -> None:
        super()._reset()
        self._state = decisions.PlateauState()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the learning rate into the logs, as Keras does, and decides."""
        logs = {} if logs is None else logs
        logs.update(rates_of.learning_rates(self.model))
        self._check_monitor(logs)
        improvement = self._improvement()
        monitored = logs.get(self.monitor)
        if monitored is None:
            warnings.warn(
                f"Learning rate reduction is conditioned on metric `{self.monitor}` which is not "
                f"available. Available metrics are: {available(logs)}.",
                stacklevel=2,
            )
            return
        current = self._number(monitored)
        rule = decisions.PlateauRule(
            improvement, self.factor, self.patience, self.cooldown, self.min_lr
        )
        rates = {
            name: rule.reduced(learning_rate(opt)) for name, opt in rates_of.optimizers(self.model)
        }
        reducible = any(rate is not None for rate in rates.values())
        decision = decisions.plateau(rule, self._state, current, reducible)
        self._adopt(decision.state)
        if decision.reduce:
            self._cut(epoch, current, rates)

    def get_state(self) -> dict[str, Any]:
        """What it remembers; the learning rate is the optimizer's."""
        return self._state._asdict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate."""
        self._adopt(decisions.PlateauState(**state))

    def _cut(self, epoch: int, current: float, rates: dict[str, float | None]) -> None:
        for name, optimizer in rates_of.optimizers(self.model):
            new, old = rates[name], learning_rate(optimizer)
            if new is None:
                continue
            optimizer.learning_rate = new
            what = "" if name == "learning_rate" else f" {optimizer.name}"
            self._say(
                f"\nEpoch {epoch + 1}: ReduceLROnPlateau reducing{what} learning rate to {new}."
            )
            self._emit(
                "plateau",
                epoch,
                monitor=self.monitor,
                value=current,
                best=self.best,
                variable=name,
                old=old,
                new=new,
            )

    def _adopt(self, state: decisions.PlateauState) -> None:
        self._state = state
        self.best, self.wait, self.cooldown_counter = state
