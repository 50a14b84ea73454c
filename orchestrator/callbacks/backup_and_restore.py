"""`BackupAndRestore` on many ranks and any fsspec filesystem."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
from fsspec.implementations.local import LocalFileSystem

from orchestrator import storage
from orchestrator.callbacks.store_checkpoint import StoreCheckpoint
from orchestrator.checkpoint.retention import EveryEpochs, EverySteps, Last, Save


class BackupAndRestore(StoreCheckpoint, keras.callbacks.BackupAndRestore):
    """Goes on where an interrupted `fit` was stopped; Keras's parameters and defaults.

    `backup_dir` is a local path or any fsspec URL. As `StoreCheckpoint` does, it saves the whole
    training state, from rank 0 alone, and listens for signals. Unlike Keras's it goes on at the
    batch it was stopped at, with what callbacks, generators and metrics remembered, and `History`
    goes on too. `save_freq=False` saves at a preemption only.
    """

    def __init__(
        self,
        backup_dir: str,
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        preempt_grace: float | None = StoreCheckpoint.GRACE,
        preempt_notice: str | None = None,
    ) -> None:
        keras.callbacks.BackupAndRestore.__init__(
            self, backup_dir, save_freq, double_checkpoint, delete_checkpoint
        )
        save: list[Save] = [EveryEpochs(1)] if save_freq == "epoch" else []
        if isinstance(save_freq, int) and save_freq:
            save = [EverySteps(save_freq)]
        StoreCheckpoint.__init__(
            self,
            os.fspath(backup_dir),
            save=save,
            keep=[Last(2 if double_checkpoint else 1)],
            resume=True,
            preempt_grace=preempt_grace,
            preempt_notice=preempt_notice,
        )

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until all is written, and removes it unless it is to be kept."""
        super().on_train_end(logs)
        if self.delete_checkpoint:
            self._runtime.on_root(self._remove)

    def _remove(self) -> None:
        for checkpoint in self.store.list():
            self.store.remove(checkpoint)
        self.store.prune(older_than=0)
        fs, path = storage.resolve(self.store.url)
        if isinstance(fs, LocalFileSystem) and not os.listdir(path):
            os.rmdir(path)
