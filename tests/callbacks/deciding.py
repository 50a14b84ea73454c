"""Callbacks that decide, with arguments that bring out each rule: Keras's and ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import keras

from orchestrator.callbacks import rates

MONITOR = "val_told"
# It falls, rises, stays, and falls once more.
VALUES = [10.0, 9.0, 8.0, 9.0, 8.875, 8.75, 7.5, 7.625, 7.5, 7.375, 9.5, 11.0, 10.5, 6.5]
RATE = 0.125


class Case(NamedTuple):
    """A callback's name and arguments; `mode` is `"min"` unless given."""

    name: str
    options: dict[str, Any]

    def make(self, module: Any, folder: Path) -> Any:
        """One, which writes into `folder` if it writes."""
        options = {"monitor": MONITOR, "mode": "min", **self.options}
        if self.name == "ModelCheckpoint":
            options |= {"filepath": str(folder / "{epoch:02d}.weights.h5")}
            options |= {"save_weights_only": True, "save_best_only": True}
        return getattr(module, self.name)(**options)


CASES = [
    *(Case("EarlyStopping", {"patience": patience}) for patience in range(4)),
    Case("EarlyStopping", {"patience": 2, "mode": "max"}),
    Case("EarlyStopping", {"patience": 2, "min_delta": 0.5}),
    Case("EarlyStopping", {"patience": 3, "baseline": 8.5}),
    Case("EarlyStopping", {"patience": 2, "baseline": 5.0}),
    Case("EarlyStopping", {"patience": 1, "start_from_epoch": 3}),
    Case("EarlyStopping", {"patience": 0, "start_from_epoch": 3}),
    Case("ReduceLROnPlateau", {"patience": 1}),
    Case("ReduceLROnPlateau", {"patience": 2, "factor": 0.5, "mode": "max"}),
    Case("ReduceLROnPlateau", {"patience": 1, "factor": 0.5, "min_delta": 0.5}),
    Case("ReduceLROnPlateau", {"patience": 1, "factor": 0.5, "cooldown": 2}),
    Case("ReduceLROnPlateau", {"patience": 2, "factor": 0.5, "cooldown": 1, "min_delta": 100}),
    Case("ReduceLROnPlateau", {"patience": 1, "factor": 0.5, "min_lr": 0.05, "min_delta": 100}),
    Case("ModelCheckpoint", {}),
    Case("ModelCheckpoint", {"mode": "max"}),
    Case("ModelCheckpoint", {"initial_value_threshold": 7.5}),
    Case("ModelCheckpoint", {"mode": "max", "initial_value_threshold": 10.0}),
]
IDS = ["-".join(map(str, (c.name, *(f"{k}={v}" for k, v in c.options.items())))) for c in CASES]


class Watched(keras.callbacks.Callback):
    """Runs a callback as if it were alone: it has a learning rate of its own, and is not obeyed.

    Attributes:
        seen: By epoch, what it has done by its end: whether it stops, its learning rate, what it
            shows as attributes, and the files it has written.
    """

    def __init__(self, callback: Any, folder: Path) -> None:
        super().__init__()
        self.callback, self._folder = callback, folder
        self.seen: list[tuple[Any, ...]] = []

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        self.callback.set_model(model)

    def on_train_begin(self, logs: Any = None) -> None:
        self._rate = RATE
        self.callback.on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.callback.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        model: Any = self.model
        usual = rates.learning_rate(model.optimizer)
        model.optimizer.learning_rate = self._rate
        self.callback.on_epoch_end(epoch, dict(logs))
        self._rate = rates.learning_rate(model.optimizer)
        names = ("best", "best_epoch", "wait", "stopped_epoch", "cooldown_counter")
        shown = {name: getattr(self.callback, name, None) for name in names}
        self.seen.append((model.stop_training, self._rate, shown, sorted(os.listdir(self._folder))))
        model.optimizer.learning_rate, model.stop_training = usual, False


def drive(watched: Watched, model: Any, values: list[float]) -> list[tuple[Any, ...]]:
    """What it does in epochs with these values, without a `fit`."""
    model.stop_training = False
    watched.set_model(model)
    watched.on_train_begin()
    for epoch, value in enumerate(values):
        watched.on_epoch_begin(epoch)
        watched.on_epoch_end(epoch, {MONITOR: value})
    return watched.seen
