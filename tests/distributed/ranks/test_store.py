"""Checkpoints from many ranks: one writer, one reader, and errors that all get together."""

from __future__ import annotations

import itertools
import os
from typing import Any

import keras
import numpy as np
import pytest

import orchestrator
from orchestrator import callbacks
from orchestrator.agreement import RankError
from orchestrator.checkpoint.retention import EveryMinutes, EverySteps
from orchestrator.checkpoint.store import CheckpointStore
from tests.distributed import problems
from tests.distributed.rank_plugin import once


def compiled(runtime, seed=1):
    model = problems.mlp(16, seed=seed)
    model.compile(
        runtime.distribute(keras.optimizers.Adam(1e-2)),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    runtime.broadcast(model)
    return model


def fit(runtime, model, *ours, epochs=2):
    part = runtime.shard(problems.digits(160), batch_size=32)  # five steps an epoch
    return model.fit(part, epochs=epochs, verbose=0, callbacks=list(ours))


class Reads(CheckpointStore):
    """Counts what is fetched."""

    fetched = 0

    def fetch(self, checkpoint):
        self.fetched += 1
        return super().fetch(checkpoint)


def test_one_rank_writes_and_one_reads(runtime, communicator, shared_path):
    model = compiled(runtime)
    saver = callbacks.StoreCheckpoint(str(shared_path / "store"), save=EverySteps(4))
    fit(runtime, model, saver)
    store = Reads(str(shared_path / "store"))
    found = [(one.step, one.manifest.world_size) for one in store.list()]
    assert communicator.allgather_object(found) == [[(4, runtime.size), (8, runtime.size)]] * (
        runtime.size
    )
    writers = communicator.allgather_object(saver._writer._thread is not None)
    assert writers == [rank == 0 for rank in range(runtime.size)]
    again = compiled(runtime, seed=5 + runtime.rank)
    checkpoint = orchestrator.restore(again, store)
    assert checkpoint is not None
    assert checkpoint.step == 8
    state = [v.numpy() for v in [*again.weights, *again.optimizer.variables]]
    assert len(set(communicator.allgather_object(tuple(problems.bits(state))))) == 1
    assert int(again.optimizer.iterations.numpy()) == 8
    # Reads do not grow with the ranks.
    assert communicator.allgather_object(store.fetched) == [1] + [0] * (runtime.size - 1)


@once
def test_minutes_are_those_of_rank_0(runtime, communicator, shared_path, monkeypatch):
    """The ranks' clocks run unlike each other; all save after the same steps."""
    clock = itertools.count(0, 30.0 * (runtime.rank + 1))
    saver = callbacks.StoreCheckpoint(
        str(shared_path / "store"), save=EveryMinutes(2), clock=lambda: next(clock)
    )
    saved: list[int] = []
    save = saver._save
    monkeypatch.setattr(saver, "_save", lambda *given: saved.append(saver._batches) or save(*given))
    fit(runtime, compiled(runtime), saver, epochs=3)
    assert len(saved) >= 2
    assert communicator.allgather_object(saved) == [saved] * runtime.size


class Failing(CheckpointStore):
    """Saves once, and then no more."""

    def save(self, *args: Any, **options: Any):
        if self.list():
            raise OSError("no space left, says the test")
        return super().save(*args, **options)


@once
@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_raised_on_all_ranks(runtime, communicator, shared_path, background):
    saver = callbacks.StoreCheckpoint(
        Failing(str(shared_path / "store")), save=EverySteps(3), background=background
    )
    ends: list[int] = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(1))
    expected = OSError if runtime.is_root else RankError
    with pytest.raises(expected, match="no space left, says the test"):
        fit(runtime, compiled(runtime), count, saver, epochs=200)
    assert len(ends) < 1000
    assert len(set(communicator.allgather_object(len(ends)))) == 1, "after the same step"


@once
def test_a_store_that_cannot_be_written_is_known_before_training(runtime, shared_path):
    if runtime.is_root:
        (shared_path / "file").write_text("")
    saver = callbacks.StoreCheckpoint(str(shared_path / "file" / "store"))
    model = compiled(runtime)
    with pytest.raises(Exception, match=r"file"):
        fit(runtime, model, saver)
    assert int(model.optimizer.iterations.numpy()) == 0


@once
def test_the_newest_whole_one_is_restored(runtime, communicator, shared_path):
    model = compiled(runtime)
    fit(runtime, model, callbacks.StoreCheckpoint(str(shared_path / "store")), epochs=3)
    communicator.barrier()
    if runtime.is_root:
        newest = max(shared_path.glob("store/step-*"))
        (weights,) = newest.rglob("model.weights.h5")
        os.truncate(weights, weights.stat().st_size - 1)
    checkpoint = orchestrator.restore(compiled(runtime), str(shared_path / "store"))
    assert checkpoint is not None
    assert checkpoint.step == 10
    assert np.isfinite(checkpoint.metrics["loss"])
