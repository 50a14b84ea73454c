"""Checkpoints in a `CheckpointStore`, written in the background while training goes on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import keras
import numpy as np

from orchestrator import runtime as runtimes
from orchestrator.callbacks.global_metrics import insert_first
from orchestrator.checkpoint.layout import WEIGHTS
from orchestrator.checkpoint.retention import EveryEpochs, Keep, Moment, Save
from orchestrator.checkpoint.state import Snapshot
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.checkpoint.writer import Writer
from orchestrator.optimizer import calls
from orchestrator.weights import state_variables

_EACH_EPOCH = EveryEpochs(1)


class StoreCheckpoint(keras.callbacks.Callback):
    """Saves weights and optimizer state to a store, from rank 0 alone.

    On all ranks. They agree on each save: by epochs and steps, which all count alike, or by rank
    0's clock, which is told beside the gradients of the next step. Moving statistics are merged
    first (one allreduce where there are any), rank 0 copies the state to host memory, and tells
    the others how that went (one small broadcast a save); it is written in the background. An
    error there is raised on all ranks at the end of a step soon after, and at the latest at the
    end of training, which waits until all is written.

    Args:
        store: A `CheckpointStore`, or a URL for one.
        save: When to save: any of these `retention` policies; after each epoch by default.
        keep: What to keep: `retention` policies; none, the default, keeps everything.
        background: Whether to write in a thread. `False` holds up training for each save.
        when_busy: With a save still being written a new one waits (`"wait"`, the default), or is
            queued and replaced by a newer one (`"replace"`), at the price of a second buffer.
        timeout: Seconds to wait for the last save at the end of training.
        clock: Seconds, from any origin.

    Raises:
        SettingError: On every rank, before training: the store cannot be written.
    """

    def __init__(
        self,
        store: CheckpointStore | str,
        *,
        save: Save | Iterable[Save] = _EACH_EPOCH,
        keep: Iterable[Keep] = (),
        background: bool = True,
        when_busy: Literal["wait", "replace"] = "wait",
        timeout: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.store = CheckpointStore(store) if isinstance(store, str) else store
        self._policies = tuple(save) if isinstance(save, Iterable) else (save,)
        self._keep = tuple(keep)
        self._clock = clock
        self._options: dict[str, Any] = {
            "background": background,
            "when_busy": when_busy,
            "timeout": timeout,
        }

    def set_model(self, model: keras.Model) -> None:
        """Sees to it that the metrics saved beside the weights are global."""
        super().set_model(model)
        self._runtime = runtimes.current()
        self._steps = self._runtime.prepare(model)
        insert_first(model)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Tries the store out, so that a wrong URL is known now, and makes the buffers."""
        self._writer = Writer(lambda: Snapshot(self.model), **self._options)
        self._runtime.on_root(self._prepare)
        for flag in ("failed", "save"):  # of an earlier training
            self._runtime.flags.down(flag)
        self._epoch = 0
        self._before = int(calls(self.model.optimizer).numpy())  # steps, by the last epoch's end
        self._batches = 0
        self._last = self._now()

    def _prepare(self) -> None:
        self.store.preflight()
        if self.model.built:
            state_variables(self.model)  # builds the optimizer, whose state is saved as well
            self._writer.prepare()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts steps on from the epochs before."""
        self._epoch = epoch
        self._before, self._batches = self._before + self._batches, 0

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Saves where steps or minutes say so, and raises what failed in the background."""
        self._batches = batch + 1
        flags = self._runtime.flags
        if flags.seen("failed"):
            self._runtime.on_root(self._writer.close)  # raises what failed
        if flags.seen("save") or self._due(self._last.time):
            self._save({})
        elif self._runtime.is_root and self._due(self._clock()):
            flags.up("save")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Saves where epochs say so, with the epoch's metrics."""
        self._epoch = epoch + 1
        if self._due(self._last.time):
            self._save(logs or {})

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until all is written."""
        self._runtime.on_root(self._writer.close)

    def _now(self) -> Moment:
        return Moment(self._epoch, self._before + self._batches, self._clock())

    def _due(self, when: float) -> bool:
        """Whether a policy asks for a save at a time; never twice at one step."""
        now = dataclasses.replace(self._now(), time=when)
        return now.step > self._last.step and any(p.due(self._last, now) for p in self._policies)

    def _save(self, logs: Mapping[str, Any]) -> None:
        self._last = now = self._now()
        self._runtime.flags.down("save")
        if self._steps is not None:
            self._steps.statistics.merge()
        metrics = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        epoch = None if now.epoch == 0 else now.epoch - 1
        self._runtime.on_root(
            lambda: self._writer.submit(
                Snapshot.copy, lambda snapshot: self._write(snapshot, now.step, epoch, metrics)
            )
        )

    def _write(
        self, snapshot: Snapshot, step: int, epoch: int | None, metrics: Mapping[str, float]
    ) -> None:
        """Commits one checkpoint; on rank 0, in the writer's thread."""
        try:
            saved = self.store.save(
                {WEIGHTS: snapshot.write_weights},
                step=step,
                epoch=epoch,
                metrics=metrics,
                world_size=self._runtime.size,
            )
            if self._keep:
                self.store.prune(self._keep)
        except BaseException:
            self._runtime.flags.up("failed")
            raise
        self._runtime.events.emit("checkpoint", epoch=epoch, step=step, rank=0, path=saved.url)
