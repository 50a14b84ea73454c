"""Checkpoints in a store from `fit`: when, what is in them, what fails."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time

import fsspec
import keras
import numpy as np
import pytest

import orchestrator
from orchestrator import callbacks
from orchestrator import runtime as runtimes
from orchestrator.checkpoint.retention import Best, EveryEpochs, EveryMinutes, EverySteps, Last
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.config import SettingError
from orchestrator.preemption import Preempted
from orchestrator.runtime import Runtime
from tests.callbacks.models import X, fit, make
from tests.fakes import FakeCommunicator, Recorder


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    yield "memory://store-checkpoint"
    memory = fsspec.filesystem("memory")
    if memory.exists("/store-checkpoint"):
        memory.rm("/store-checkpoint", recursive=True)


def steps(url):
    return [(one.step, one.epoch) for one in CheckpointStore(url).list()]


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        (EveryEpochs(1), [(3, 0), (6, 1), (9, 2), (12, 3)]),
        (EveryEpochs(2), [(6, 1), (12, 3)]),
        (EverySteps(5), [(5, 0), (10, 2)]),
        ((EveryEpochs(3), EverySteps(5)), [(5, 0), (9, 2), (10, 2)]),
    ],
    ids=str,
)
def test_when(url, policies, expected):
    fit(make(), callbacks.StoreCheckpoint(url, save=policies), epochs=4)  # of 3 steps each
    assert steps(url) == expected


def test_minutes(url):
    """The clock is asked once at first, then once or twice a batch: a save every few batches."""
    clock = itertools.count(0, 40.0)
    saver = callbacks.StoreCheckpoint(url, save=EveryMinutes(4), clock=lambda: next(clock))
    fit(make(), saver, epochs=4)
    found = [step for step, _ in steps(url)]
    assert 1 <= len(found) <= 4
    assert all(b - a >= 2 for a, b in itertools.pairwise(found))


def test_the_checkpoint_is_the_model_as_it_was(url, tmp_path):
    model = make()
    kept = []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kept.append((model.get_weights(), dict(logs)))
    )
    fit(model, callbacks.StoreCheckpoint(url), keep, epochs=3)
    store = CheckpointStore(url)
    for checkpoint, (weights, logs) in zip(store.list(), kept, strict=True):
        assert checkpoint.metrics == pytest.approx(logs)
        loaded = make()
        loaded.optimizer.build(loaded.trainable_variables)
        with store.fetch(checkpoint) as folder:
            loaded.load_weights(os.path.join(folder, "model.weights.h5"))
        for ours, theirs in zip(loaded.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert int(loaded.optimizer.iterations.numpy()) == checkpoint.step


def test_what_is_kept(url):
    saver = callbacks.StoreCheckpoint(url, keep=[Last(2), Best("val_loss", "max")])
    fit(make(), saver, epochs=5)
    found = steps(url)
    assert found[-2:] == [(12, 3), (15, 4)]
    assert len(found) == 3
    best = CheckpointStore(url).best("val_loss", "max")
    assert best is not None
    assert best.step == found[0][0]


def test_events(url):
    runtime = Runtime(SingleCommunicator())
    runtime.events = recorder = Recorder()
    with runtime.use():
        fit(make(), callbacks.StoreCheckpoint(url), epochs=2)
    assert [(e["kind"], e["step"], e["epoch"]) for e in recorder.events] == [
        ("checkpoint", 3, 0),
        ("checkpoint", 6, 1),
    ]


class Failing(CheckpointStore):
    """Saves once, and then no more."""

    def save(self, *args, **kwargs):
        if self.list():
            raise OSError("no space left, says the test")
        return super().save(*args, **kwargs)


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_raised(url, background):
    epochs = []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    saver = callbacks.StoreCheckpoint(Failing(url), background=background)
    with pytest.raises(OSError, match="no space left, says the test"):
        fit(make(), count, saver, epochs=500)
    assert len(epochs) < 500
    assert steps(url) == [(3, 0)]


def test_a_wrong_store_is_known_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, SettingError)):
        fit(make(), callbacks.StoreCheckpoint(str(tmp_path / "file" / "store")))


def test_the_thread_ends_with_training(url):
    before = set(threading.enumerate())
    fit(make(), callbacks.StoreCheckpoint(url))
    assert not [t for t in set(threading.enumerate()) - before if t.name == "checkpoint-writer"]


def test_other_ranks_save_nothing(url):
    communicator = FakeCommunicator(1, 2, broadcast=lambda value: value)
    with Runtime(communicator).use() as runtime:
        model = make()
        runtime.distribute(model.optimizer)
        runtime.broadcast(model)
        fit(model, callbacks.StoreCheckpoint(url), epochs=2)
    assert steps(url) == []


def test_it_serves_a_second_training(url):
    model, saver = make(), callbacks.StoreCheckpoint(url)
    fit(model, saver)
    fit(model, saver)
    assert steps(url) == [(3, 0), (6, 0)]


def test_restore(url):
    model = make()
    fit(model, callbacks.StoreCheckpoint(url), epochs=3)
    fresh, runtime = make(), Runtime(SingleCommunicator())
    runtime.events = recorder = Recorder()
    with runtime.use():
        checkpoint = orchestrator.restore(fresh, url)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.epoch) == (9, 2)
    ours = [*fresh.weights, *fresh.optimizer.variables]
    theirs = [*model.weights, *model.optimizer.variables]
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    np.testing.assert_array_equal(fresh.predict(X, verbose=0), model.predict(X, verbose=0))
    assert (recorder.events[0]["kind"], recorder.events[0]["passed_over"]) == ("restore", [])


def test_restore_from_nothing(url):
    model = make()
    before = model.get_weights()
    assert orchestrator.restore(model, CheckpointStore(url)) is None
    for one, two in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, two)


class Notice(keras.callbacks.Callback):
    """Raises the flag that a signal raises, before a step."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self._when, self._epoch = (epoch, batch), -1

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self._epoch, batch) == self._when:
            runtimes.current().flags.up("preempt")


@pytest.mark.parametrize("batch", [0, 1, 2], ids=["first", "middle", "last of the epoch"])
def test_a_notice_ends_training_which_goes_on_from_there(url, batch):
    runtime = Runtime(SingleCommunicator())
    with runtime.use():
        expected = fit(make(), epochs=4, shuffle=False).history
        saver = callbacks.StoreCheckpoint(url, preempt_grace=None)
        with pytest.raises(Preempted) as caught:
            fit(make(), Notice(1, batch), saver, epochs=4, shuffle=False)
        assert (caught.value.epoch, caught.value.step) == (1, 3 + batch + 1)
        assert steps(url)[-1] == (3 + batch + 1, 0)
        runtime.events = recorder = Recorder()
        saver = callbacks.StoreCheckpoint(url, preempt_grace=None, resume=True)
        assert fit(make(), saver, epochs=4, shuffle=False).history == expected
    saved = [event["step"] for event in recorder.events if event["kind"] == "checkpoint"]
    assert saved == [6, 9, 12][batch == 2 :], "no step is saved twice"


def test_a_notice_leaves_no_time_to_remove_what_is_old(url):
    with Runtime(SingleCommunicator()).use():
        saver = callbacks.StoreCheckpoint(url, keep=[Last(1)], preempt_grace=None)
        with pytest.raises(Preempted):
            fit(make(), Notice(1, 0), saver, epochs=4)
        assert steps(url) == [(3, 0), (4, 0)]
        fit(make(), callbacks.StoreCheckpoint(url, keep=[Last(1)], resume=True), epochs=4)
        assert steps(url) == [(12, 3)]


class Late(CheckpointStore):
    """A notice comes while the last checkpoint is written, when training has ended."""

    def save(self, *args, **kwargs):
        if kwargs["step"] == 6:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return super().save(*args, **kwargs)


def test_a_notice_while_the_last_checkpoint_is_written(url):
    outside = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: outside.append(number))
    try:
        fit(make(), callbacks.StoreCheckpoint(Late(url)), epochs=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps(url) == [(3, 0), (6, 1)]
    assert outside == [], "heard, and training was at its end"
