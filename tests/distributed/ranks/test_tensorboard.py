"""TensorBoard on real ranks: its own reader finds global metrics, of one writer, once each."""

from __future__ import annotations

import os
from pathlib import Path

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.checkpoint.retention import EverySteps
from orchestrator.runtime import Runtime
from tests.callbacks.test_backup_and_restore import Interrupt
from tests.callbacks.test_tensorboard import read
from tests.distributed import problems
from tests.distributed.rank_plugin import three

EPOCHS, STEPS = 3, 4


class Losses(keras.callbacks.Callback):
    """What this rank's own part says at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float((logs or {})["loss"]))


def fit(communicator, folder, *others):
    """Four steps an epoch, of two samples a rank; the ranks' targets are far apart."""
    keras.backend.clear_session()
    size = communicator.size
    targets = np.tile(np.repeat(np.arange(size), 2), STEPS)
    validation = problems.points(np.arange(2 * size) ** 2)
    board = callbacks.TensorBoard(str(folder / "logs"), update_freq=1)
    saver = callbacks.StoreCheckpoint(str(folder / "store"), resume=True, save=EverySteps(3))
    # One that has sharded nothing yet, as in a process of its own.
    with Runtime(communicator).use() as runtime:
        model = problems.line()
        model.compile(runtime.distribute(keras.optimizers.SGD(0.05)), "mse", metrics=["mae"])
        try:
            return model.fit(
                runtime.shard(problems.points(targets), batch_size=2 * size),
                validation_data=runtime.shard(validation, batch_size=2 * size),
                epochs=EPOCHS,
                verbose=0,
                callbacks=[board, *others, saver],
            )
        finally:
            saver.close()
            runtime.on_root(saver._writer.close)


def on_root(runtime, folder: Path):
    """All that the reader finds, and who wrote it: read on rank 0, told to all."""

    def look():
        files = [path.name for path in (folder / "logs").rglob("*") if path.is_file()]
        return {part: read(folder / "logs" / part) for part in ("train", "validation")}, files

    return runtime.on_root(look)


def values(found, part, tag):
    return [value for _, value in found[part][tag]]


@three
def test_one_writer_of_global_metrics(runtime, communicator, shared_path):
    losses = Losses()
    history = fit(communicator, shared_path, losses).history
    found, files = on_root(runtime, shared_path)
    assert communicator.allgather_object(history) == [history] * runtime.size
    for part, prefix in (("train", ""), ("validation", "val_")):
        for name in ("loss", "mae"):
            assert values(found, part, f"epoch_{name}") == pytest.approx(history[prefix + name])
            assert [step for step, _ in found[part][f"epoch_{name}"]] == list(range(EPOCHS))
    tag = "evaluation_mae_vs_iterations"
    assert values(found, "validation", tag) == pytest.approx(history["val_mae"])
    assert [step for step, _ in found["validation"][tag]] == [
        STEPS * (e + 1) for e in range(EPOCHS)
    ]
    own = communicator.allgather_object(losses.seen)
    assert all(own[0] != others for others in own[1:])
    assert values(found, "train", "batch_loss") == pytest.approx(np.mean(own, axis=0).tolist())
    pids = communicator.allgather_object(os.getpid())
    # TensorFlow names a file by time, host, process and number.
    assert len(files) == 2
    assert {int(name.split(".")[-4]) for name in files} == {pids[0]}


@three
def test_continued_without_gaps_or_doubles(runtime, communicator, shared_path):
    """Killed between two saves: what was written since the first of them comes once."""
    fit(communicator, shared_path / "whole")
    with pytest.raises(InterruptedError):
        fit(communicator, shared_path / "parts", Interrupt(9))
    killed, before = on_root(runtime, shared_path / "parts")
    assert killed["train"]["batch_loss"][-1][0] > 6, "later than the checkpoint"
    assert len(killed["train"]["epoch_loss"]) == 2
    fit(communicator, shared_path / "parts")
    whole, _ = on_root(runtime, shared_path / "whole")
    parts, files = on_root(runtime, shared_path / "parts")
    for part, tags in whole.items():
        assert set(parts[part]) == set(tags)
        for tag in set(tags) - {"keras"}:  # the graph, which is a string
            assert parts[part][tag] == tags[tag], tag
    assert [step for step, _ in parts["train"]["batch_loss"]] == list(range(1, EPOCHS * STEPS + 1))
    assert set(before) < set(files), "a second process's files beside the first's"
