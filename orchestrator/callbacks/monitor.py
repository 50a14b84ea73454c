"""What our monitoring callbacks share: the direction of a metric, and what to do without it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
import numpy as np

from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.config import SettingError
from orchestrator.decisions import Improvement

Missing = Literal["warn", "error"]


class Monitor(RankAware):
    """Mixed into a Keras callback that watches one metric.

    Keras's class beside it gives `monitor`, `mode`, `min_delta` and the inference of a direction.
    """

    monitor: str
    min_delta: float
    monitor_op: Any
    missing: Missing = "warn"
    _set_monitor_op: Callable[[], None]

    def _if_missing(self, missing: Missing) -> None:
        """Takes the argument of that name."""
        if missing not in ("warn", "error"):
            raise SettingError(
                f"{type(self).__name__}(missing={missing!r}) is not allowed: 'warn', as Keras "
                "does, or 'error'."
            )
        self.missing = missing

    def _check_monitor(self, logs: Mapping[str, Any], *, in_epoch: bool = False) -> None:
        """Raises, with `missing="error"`, as soon as it is known that the metric is not there.

        Args:
            logs: Global, so that all ranks raise.
            in_epoch: They are those of a batch: validation has no part in them.
        """
        if self.missing != "error" or self.monitor in logs:
            return
        validated = any(name.startswith("val_") for name in logs)
        if self.monitor.startswith("val_") and not validated and not in_epoch and _validates():
            return  # in another epoch, by `validation_freq`
        raise SettingError(
            f"{type(self).__name__}(monitor={self.monitor!r}): there is no such metric. Available: "
            f"{available(logs)}. Monitor one of these, or compile the model with it."
        )

    def _number(self, value: Any) -> float:
        """The monitored value; as in Keras, an array of one element is that element."""
        array = np.asarray(value)
        if array.size != 1:
            raise SettingError(
                f"{type(self).__name__}(monitor={self.monitor!r}): its value is {array.size} "
                "numbers, and which of two is better is not known. Monitor a metric of one "
                "number; many take an average, such as keras.metrics.F1Score(average='macro')."
            )
        return float(array.item())

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


def available(logs: Mapping[str, Any] | None) -> str:
    """The names in `logs`, for messages."""
    return ", ".join(sorted(logs or {})) or "none"


def _validates() -> bool:
    """Whether the `fit` that is calling has validation data; Keras does not tell callbacks."""
    frame = inspect.currentframe()
    while frame is not None:
        given = frame.f_locals
        if frame.f_code.co_name == "fit" and "validation_freq" in given:
            return given.get("validation_data") is not None
        frame = frame.f_back
    return False
