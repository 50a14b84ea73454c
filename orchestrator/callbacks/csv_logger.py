"""`CSVLogger` on many ranks and any fsspec filesystem."""

from __future__ import annotations

import csv
import io
from typing import Any

import keras
import numpy as np

from orchestrator import runtime as runtimes
from orchestrator import storage
from orchestrator.callbacks.global_metrics import insert_first
from orchestrator.callbacks.rates import learning_rates


class CSVLogger(keras.callbacks.CSVLogger):
    """Writes each epoch's global logs as a line, from rank 0 alone; Keras's columns.

    `filename` is a local path or any fsspec URL. The outcome of each write is shared (one small
    broadcast an epoch), so that a full disk under rank 0 ends all ranks.
    """

    def set_model(self, model: keras.Model) -> None:
        """Sees to it that logs are global."""
        super().set_model(model)
        self._runtime = runtimes.current()
        self._runtime.prepare(model)
        insert_first(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts the file."""
        self.keys = None
        self._runtime.on_root(self._open)

    def _open(self) -> None:
        self._lines = storage.Lines(self.filename, keep=self.append)
        self.append_header = self._lines.empty

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds a line; the first epoch's names, sorted, are the columns."""
        logs, rates = logs or {}, learning_rates(self.model)
        first = self.keys is None
        if first:
            self.keys = _columns(sorted(logs))
            self.keys += [name for name in rates if name not in self.keys]
        values = {**rates, **logs}
        row = [epoch, *(_cell(values.get(key, "NA")) for key in self.keys or [])]
        header = ["epoch", *(self.keys or [])] if first else None
        self._runtime.on_root(lambda: self._write(header, row))

    def get_state(self) -> dict[str, Any]:
        """The file so far; asked on rank 0, which has it."""
        return {"keys": self.keys, "text": self._lines.read()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there, without what was written later (one small broadcast)."""
        self.keys = state["keys"]

        def replace() -> None:
            self._lines.replace(state["text"].splitlines())
            self.append_header = self._lines.empty

        self._runtime.on_root(replace)

    def _write(self, header: list[Any] | None, row: list[Any]) -> None:
        rows = [header, row] if header and self.append_header else [row]
        for cells in rows:
            text = io.StringIO()
            csv.writer(text, delimiter=self.sep, lineterminator="").writerow(cells)
            self._lines.append(text.getvalue())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Nothing is left open."""


def _columns(names: list[str]) -> list[str]:
    """As in Keras, columns for a validation that the first epoch has not had."""
    if any(name.startswith("val_") for name in names):
        return names
    return names + [f"val_{name}" for name in names if not name.startswith("learning_rate")]


def _cell(value: Any) -> Any:
    return value if np.ndim(value) == 0 else f'"[{", ".join(map(str, np.ravel(value)))}]"'
