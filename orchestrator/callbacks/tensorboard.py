"""`TensorBoard` on many ranks and any fsspec filesystem."""

from __future__ import annotations

import importlib.util
import os
import secrets
from typing import Any

import keras

from orchestrator import storage
from orchestrator.callbacks.event_files import EventFiles
from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.callbacks.root_hooks import RootHooks
from orchestrator.config import SettingError


class TensorBoard(RankAware, keras.callbacks.TensorBoard):
    """Writes global metrics for TensorBoard, from rank 0 alone; Keras's parameters and defaults.

    `log_dir` is a local path or any fsspec URL; what is bound for a URL is written on the local
    disk first and put there at the end of each epoch, and before each save of `StoreCheckpoint`.

    On all ranks. With `update_freq` in batches the metrics so far are combined at each of these
    batches (one allreduce). What fails on rank 0 is raised on all ranks at the end of the epoch
    (one small broadcast an epoch). A run that is continued takes what was written after its
    checkpoint out of its event files, so that steps come once each.

    Raises:
        SettingError: On every rank, before training: TensorBoard is not installed, or nothing can
            be written to `log_dir`.
    """

    def set_model(self, model: keras.Model) -> None:
        """Writes nothing yet: a run that is continued has its graph already."""
        keras.callbacks.Callback.set_model(self, model)
        self._join(model)
        self._writers = {}
        self._training = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Tries `log_dir` out, and starts afresh."""
        self._training, self._begun = True, False
        self._batches = self._global_train_batch = 0
        self._previous_epoch_iterations = 0
        self._tested_at: int | None = None
        self._open()

    def _open(self) -> None:
        """Readies the files, on rank 0; called by all ranks."""
        self._hooks = RootHooks(self._runtime)
        self._close_writers()
        self._writers = {}
        self._has_graph = not self.write_graph
        self._should_write_train_graph = False
        self._files = EventFiles(self.log_dir, secrets.token_hex(4))
        self._hooks.share(self._try)

    def _try(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise SettingError(
                "callbacks.TensorBoard needs the package tensorboard, which TensorFlow no longer "
                "brings. Install it: pip install 'keras-orchestrator[tensorboard]'"
            )
        storage.preflight(self.log_dir)
        self._log_write_dir = self._files.folder()
        self._train_dir = os.path.join(self._log_write_dir, "train")
        self._val_dir = os.path.join(self._log_write_dir, "validation")

    def _begin(self) -> None:
        """What Keras writes before it trains; on rank 0, once it is known what is there."""
        self._write_graph()
        self._push_writer(self._train_writer, self._global_train_batch)

    def _write_graph(self) -> None:
        if self.embeddings_freq:
            os.makedirs(self._log_write_dir, exist_ok=True)
            self._configure_embeddings()
        if not self._has_graph:
            self._write_keras_model_summary()
            self._has_graph = self._should_write_train_graph = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begins to write, in the first epoch (one small broadcast)."""
        if not self._begun:
            self._begun = True
            self._hooks.share(self._begin)
        self._hooks.run(super().on_epoch_begin, epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Counts."""
        self._batches += 1
        self._hooks.run(super().on_train_batch_begin, batch, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what `update_freq` asks for, of all ranks together."""
        if self.update_freq != "epoch" and self._batches % int(self.update_freq) == 0:
            logs = self._of_all_ranks(logs)
        self._hooks.run(super().on_train_batch_end, batch, logs)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Readies the files, outside of training."""
        if not self._training:
            self._open()
            self._hooks.run(self._write_graph)
        self._hooks.run(super().on_test_begin, logs)

    def on_test_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Counts."""
        self._hooks.run(super().on_test_batch_begin, batch, logs)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Writes the results; those within training when they are global, as the epoch ends."""
        if self._training:
            self._tested_at = int(self.model.optimizer.iterations.numpy())
            self._hooks.run(self._pop_writer)
            return
        self._hooks.run(super().on_test_end, self._of_all_ranks(logs))
        self._hooks.share(self._put)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the epoch's global metrics (one small broadcast of the outcome)."""
        usual = super().on_epoch_end

        def write() -> None:
            # Under Keras's the batch that came last decides whether an epoch is recorded at all.
            with self.summary.record_if(True):
                self._write_evaluation(logs or {})
                usual(epoch, logs)
            self._put()

        self._hooks.share(write)
        self._tested_at = None

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Closes the files (one small broadcast of the outcome)."""
        self._training = False
        usual = super().on_train_end if self._begun else lambda logs: self._close_writers()

        def close() -> None:
            usual(logs)
            self._put()

        self._hooks.share(close)

    def get_state(self) -> dict[str, Any]:
        """What was counted, and how long each file is; asked on rank 0, which has them."""
        self._hooks.run(self._put)
        return {
            "run": self._files.run,
            "files": self._files.sizes,
            "has_graph": self._has_graph,
            "batches": self._batches,
            "test_batches": self._global_test_batch,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there, without what was written later (one small broadcast)."""
        self._batches = self._global_train_batch = state["batches"]
        self._global_test_batch = state["test_batches"]
        self._has_graph = state["has_graph"] or not self.write_graph
        self._files.run = state["run"]
        self._hooks.share(lambda: self._files.rewind(state["files"]))

    @property
    def _train_writer(self) -> Any:
        return self._writer("train", self._train_dir)

    @property
    def _val_writer(self) -> Any:
        return self._writer("val", self._val_dir)

    def _writer(self, name: str, folder: str) -> Any:
        if name not in self._writers:
            suffix = self._files.suffix
            self._writers[name] = self.summary.create_file_writer(folder, filename_suffix=suffix)
        return self._writers[name]

    def _put(self) -> None:
        """All that was written is in `log_dir` when this returns; on rank 0."""
        for writer in self._writers.values():
            writer.flush()
        self._files.put()

    def _write_evaluation(self, logs: dict[str, Any]) -> None:
        if self._tested_at is None:
            return
        with self._val_writer.as_default():
            for name, value in logs.items():
                if name.startswith("val_"):
                    name = f"evaluation_{name.removeprefix('val_')}_vs_iterations"
                    self.summary.scalar(name, value, step=self._tested_at)
