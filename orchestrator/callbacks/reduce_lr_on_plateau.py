"""`ReduceLROnPlateau` on many ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import keras

from orchestrator import decisions
from orchestrator.callbacks.monitor import Monitor, available, learning_rate


class ReduceLROnPlateau(Monitor, keras.callbacks.ReduceLROnPlateau):
    """Cuts the learning rate on all ranks at one epoch; Keras's parameters and defaults.

    The decision is made on every rank from the same global logs; it does not communicate.
    Unlike Keras's, a NaN is never an improvement, and any finite value improves on it.
    """

    def _reset(self) -> None:
        super()._reset()
        self._state = decisions.PlateauState()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the learning rate into the logs, as Keras does, and decides."""
        improvement = self._improvement()
        logs = {} if logs is None else logs
        for name, optimizer in self._optimizers():
            logs[name] = learning_rate(optimizer)
        current = logs.get(self.monitor)
        if current is None:
            warnings.warn(
                f"Learning rate reduction is conditioned on metric `{self.monitor}` which is not "
                f"available. Available metrics are: {available(logs)}.",
                stacklevel=2,
            )
            return
        rule = decisions.PlateauRule(
            improvement, self.factor, self.patience, self.cooldown, self.min_lr
        )
        rates = {name: rule.reduced(learning_rate(opt)) for name, opt in self._optimizers()}
        reducible = any(rate is not None for rate in rates.values())
        decision = decisions.plateau(rule, self._state, float(current), reducible)
        self._adopt(decision.state)
        if decision.reduce:
            self._cut(epoch, float(current), rates)

    def get_state(self) -> dict[str, Any]:
        """What it remembers; the learning rate is the optimizer's."""
        return self._state._asdict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate."""
        self._adopt(decisions.PlateauState(**state))

    def _cut(self, epoch: int, current: float, rates: dict[str, float | None]) -> None:
        for name, optimizer in self._optimizers():
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

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        optimizer = self.model.optimizer
        if hasattr(optimizer, "optimizers"):
            for inner in optimizer.optimizers:
                yield f"learning_rate_{inner.name}", inner
        else:
            yield "learning_rate", optimizer
