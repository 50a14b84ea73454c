"""What our monitoring callbacks share: global logs, the direction of a metric, events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

from orchestrator import runtime as runtimes
from orchestrator.callbacks.global_metrics import insert_first
from orchestrator.config import SettingError
from orchestrator.decisions import Improvement


class Monitor(keras.callbacks.Callback):
    """Mixed into a Keras callback that watches one metric.

    Keras's class beside it gives `monitor`, `mode`, `min_delta` and the inference of a direction.
    """

    monitor: str
    min_delta: float
    monitor_op: Any
    _set_monitor_op: Callable[[], None]

    def set_model(self, model: keras.Model) -> None:
        """Sees to it that logs are global before any callback reads them."""
        super().set_model(model)
        self._runtime = runtimes.current()
        self._steps = self._runtime.prepare(model)
        insert_first(model)

    def _improvement(self) -> Improvement:
        """The direction of `monitor`; Keras infers it once the metrics are built."""
        if self.monitor_op is None:
            try:
                self._set_monitor_op()
            except ValueError as error:
                raise SettingError(str(error)) from None
        mode = "min" if self.monitor_op is keras.ops.less else "max"
        # Keras flips the sign of `min_delta` in place for "min".
        return Improvement(mode, abs(self.min_delta))

    def _emit(self, kind: str, epoch: int | None, **values: Any) -> None:
        optimizer = getattr(self.model, "optimizer", None)
        step = int(optimizer.iterations.numpy()) if optimizer is not None else None
        self._runtime.events.emit(kind, epoch=epoch, step=step, rank=0, **values)

    def _say(self, message: str) -> None:
        if getattr(self, "verbose", 0):
            self._runtime.say(message)


def available(logs: Mapping[str, Any] | None) -> str:
    """The names in `logs`, for messages."""
    return ", ".join(sorted(logs or {})) or "none"


def learning_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """The current learning rate, of a variable or of a schedule."""
    rate = optimizer.learning_rate
    return float((rate.value if isinstance(rate, keras.Variable) else rate).numpy())
