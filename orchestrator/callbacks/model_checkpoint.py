"""`ModelCheckpoint` on many ranks and any fsspec filesystem."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from orchestrator import decisions, storage
from orchestrator.callbacks.monitor import Missing, Monitor, available
from orchestrator.checkpoint import best
from orchestrator.config import SettingError


class ModelCheckpoint(Monitor, keras.callbacks.ModelCheckpoint):
    """Saves the model from rank 0 alone, whole or not at all; Keras's parameters and defaults.

    `filepath` is a local path or any fsspec URL, filled from global metrics. On a local disk the
    file appears by one rename after fsync. Every rank decides from the same global logs; rank 0
    writes and shares the outcome (one small broadcast a save), so that an error there is raised
    on all ranks. With `save_freq` in batches the metrics so far are combined at each save (one
    allreduce). Unlike Keras's, a NaN is never an improvement, and any finite value improves on it.

    With `save_best_only` the file says how good it is, beside the model, and a later run replaces
    it by a better one only: before the first save under a name rank 0 looks, and tells (one small
    broadcast). A file that is the best by another metric is replaced.

    With `save_best_only` and `missing="error"` a metric that is not there is a `SettingError` on
    every rank; `"warn"`, the default, warns and saves, as Keras does.

    Raises:
        SettingError: On every rank, before training: nothing can be written there (a small file
            is written, read and deleted). From the first save: `filepath` names a metric that is
            not there.
    """

    def __init__(
        self,
        filepath: str,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        missing: Missing = "warn",
    ) -> None:
        super().__init__(
            filepath,
            monitor,
            verbose,
            save_best_only,
            save_weights_only,
            mode,
            save_freq,
            initial_value_threshold,
        )
        self._if_missing(missing)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Tries the target out, so that a wrong bucket is known now, and counts batches afresh."""
        super().on_train_begin(logs)
        self._runtime.on_root(lambda: storage.preflight(self._folder()))
        self._batches = decisions.BatchCount()
        self._recalled: set[str] = set()
        self._goes_on = False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves every `save_freq` batches."""
        if self.save_freq == "epoch":
            return
        self._batches, due = decisions.batches_due(self._batches, batch, int(self.save_freq))
        if due:
            logs = self._of_all_ranks(logs)
            if self.save_best_only:
                self._check_monitor(logs, in_epoch=True)
            self._save(self._current_epoch, batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves, if it is time for it and, with `save_best_only`, if this epoch is the best."""
        if self.save_best_only:
            self._check_monitor(logs or {})
        self._improvement()
        if self.save_freq == "epoch":
            self._save(epoch, None, logs or {})

    def get_state(self) -> dict[str, Any]:
        """The best so far, and the batches counted."""
        return {"best": self.best, "batches": self._batches._asdict()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate.

        What a file says of itself no longer counts: it may have been saved later than that.
        """
        self.best = state["best"]
        self._batches = decisions.BatchCount(**state["batches"])
        self._goes_on = True

    def _save(self, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> None:
        filepath = self._get_file_path(epoch, batch, logs)
        if self.save_best_only and not self._is_best(epoch, filepath, logs):
            return
        if not self.save_best_only:
            self._say(f"\nEpoch {epoch + 1}: saving model to {filepath}")
        if self._steps is not None:
            self._steps.statistics.merge()
        self._runtime.on_root(lambda: storage.replace(filepath, self._write))
        self._say(f"\nEpoch {epoch + 1}: finished saving model to {filepath}")
        value = _scalar(logs.get(self.monitor))
        self._emit("checkpoint", epoch, path=filepath, monitor=self.monitor, value=value)

    def _write(self, path: str) -> None:
        if self.save_weights_only:
            self.model.save_weights(path, overwrite=True)
        else:
            self.model.save(path, overwrite=True)
        if self.save_best_only and self.best is not None:
            best.remember(path, best.Best(self.monitor, self._improvement().mode, self.best))

    def _is_best(self, epoch: int, filepath: str, logs: Mapping[str, Any]) -> bool:
        """Decides, and remembers a new best. As Keras does, saves where it cannot tell."""
        current = _scalar(logs.get(self.monitor))
        if current is None:
            warnings.warn(
                f"Can save best model only with {self.monitor} available, as a scalar; saving. "
                f"Available: {available(logs)}.",
                stacklevel=2,
            )
            return True
        improvement = self._improvement()
        if improvement(current, self.best):
            self._recall(filepath)
        before = "None" if self.best is None else f"{self.best:.5f}"
        if not improvement(current, self.best):
            self._say(f"\nEpoch {epoch + 1}: {self.monitor} did not improve from {before}")
            return False
        self._say(
            f"\nEpoch {epoch + 1}: {self.monitor} improved from {before} to {current:.5f}, "
            f"saving model to {filepath}"
        )
        self.best = current
        return True

    def _recall(self, filepath: str) -> None:
        """Takes up the best of an earlier run that saved under this name; asks once a name."""
        if filepath in self._recalled or self._goes_on:
            return
        self._recalled.add(filepath)
        found = self._runtime.on_root(lambda: best.recall(filepath))
        improvement = self._improvement()
        if found is None or (found.monitor, found.mode) != (self.monitor, improvement.mode):
            return
        if self.best is None or improvement(found.value, self.best):
            self._say(f"\n{filepath} is there from an earlier run, with {found.value:.5f}")
            self.best = found.value

    def _folder(self) -> str:
        """Where files go, as far as it is known before there are epochs and metrics."""
        return self.filepath.partition("{")[0].rpartition("/")[0] or os.curdir

    def _get_file_path(self, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> str:
        values = {**logs, "epoch": epoch + 1}
        if batch is not None:
            values.setdefault("batch", batch + 1)
        try:
            return self.filepath.format(**values)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise SettingError(
                f"ModelCheckpoint's filepath={self.filepath!r} cannot be filled: {error!s}. "
                f"Names it may use here: {available(values)}."
            ) from None


def _scalar(value: Any) -> float | None:
    return float(value) if value is not None and np.ndim(value) == 0 else None
