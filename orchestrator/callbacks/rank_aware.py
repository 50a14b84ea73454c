"""`RankAware`: what a callback on many ranks begins with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import keras

from orchestrator import metrics
from orchestrator import runtime as runtimes
from orchestrator.callbacks.global_metrics import insert_first
from orchestrator.runtime import Runtime


class RankAware(keras.callbacks.Callback):
    """A base, or a class to mix in first, for callbacks of your own; `docs/custom-callbacks.md`.

    Its hooks are called on all ranks, with global logs in `on_epoch_end` (a `GlobalMetrics` is
    put first in the list). Within an epoch logs are those of this rank's part. It does not
    communicate itself. Give a subclass `get_state()` and `set_state(state)` to have what it
    remembers saved by `StoreCheckpoint`.
    """

    def set_model(self, model: keras.Model) -> None:
        """Readies the model's steps, and sees to it that logs are global."""
        super().set_model(model)
        self._join(model)

    @functools.cached_property
    def _runtime(self) -> Runtime:
        """For hooks called by hand, without a model."""
        return runtimes.current()

    def _join(self, model: keras.Model) -> None:
        self._runtime = runtimes.current()
        self._steps = self._runtime.prepare(model)
        insert_first(model)

    @property
    def runtime(self) -> Runtime:
        """The ranks: `rank`, `size`, `is_root`, `on_root`, `say`, `communicator`."""
        return self._runtime

    def _of_all_ranks(self, logs: Mapping[str, Any] | None) -> dict[str, Any]:
        """The global metrics so far; called by all ranks. One allreduce."""
        if self._runtime.size == 1:
            return dict(logs or {})
        state = metrics.snapshot(self.model, logs)
        (state,) = metrics.global_states(self._runtime.communicator, self.model, [state])
        return dict(metrics.results(self.model, state))

    def _emit(self, kind: str, epoch: int | None, rank: int = 0, **values: Any) -> None:
        optimizer = getattr(self.model, "optimizer", None)
        step = int(optimizer.iterations.numpy()) if optimizer is not None else None
        self._runtime.events.emit(kind, epoch=epoch, step=step, rank=rank, **values)

    def _say(self, message: str) -> None:
        if getattr(self, "verbose", 0):
            self._runtime.say(message)
