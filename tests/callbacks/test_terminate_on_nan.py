"""TerminateOnNaN: Keras's behaviour in one process, and one decision on two ranks."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

from orchestrator import SettingError, callbacks
from orchestrator.checkpoint.retention import EverySteps
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.runtime import Runtime
from tests.callbacks import ranks
from tests.callbacks.models import X, Y, fit, make
from tests.fakes import Recorder


class Batches(keras.callbacks.Callback):
    """Which hooks were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self.ended = False

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch, batch))

    def on_train_end(self, logs=None):
        self.ended = True


def poisoned(at: int) -> np.ndarray:
    y = Y.copy()
    y[at] = np.nan
    return y


def test_it_ends_at_the_batch():
    seen, model = Batches(), make()
    history = model.fit(
        X,
        poisoned(5),
        batch_size=4,
        shuffle=False,
        epochs=3,
        verbose=0,
        callbacks=[callbacks.TerminateOnNaN(), seen],
    )
    assert seen.seen == [(0, 0), (0, 1)]
    assert seen.ended
    assert len(history.history["loss"]) == 1
    assert np.isnan(history.history["loss"][0])


def test_infinity_counts_too():
    model = make(loss=lambda y, p: keras.ops.mean(p) * np.float32(np.inf))
    seen = Batches()
    fit(model, callbacks.TerminateOnNaN(), seen, epochs=3)
    assert len(seen.seen) == 1


def test_raise_error_leaves_the_others_without_their_end():
    seen, model = Batches(), make()
    with pytest.raises(RuntimeError, match=r"NaN or Inf loss encountered at batch 2\. Loss value"):
        model.fit(
            X,
            poisoned(9),
            batch_size=4,
            shuffle=False,
            epochs=3,
            verbose=0,
            callbacks=[callbacks.TerminateOnNaN(raise_error=True), seen],
        )
    assert not seen.ended


@pytest.mark.parametrize("raise_error", [False, True])
def test_a_good_training_goes_on(raise_error):
    seen = Batches()
    fit(make(), callbacks.TerminateOnNaN(raise_error), seen, epochs=2)
    assert len(seen.seen) == 6


def test_the_next_fit_begins_anew():
    terminate, seen = callbacks.TerminateOnNaN(), Batches()
    bad = make(loss=lambda y, p: keras.ops.mean(p) * np.float32(np.nan))
    fit(bad, terminate)
    fit(make(), terminate, seen, epochs=2)
    assert len(seen.seen) == 6


def test_the_event():
    runtime, recorder = Runtime(SingleCommunicator()), Recorder()
    runtime.events = recorder
    with runtime.use():
        model = make()
        options = {"batch_size": 4, "shuffle": False, "verbose": 0}
        model.fit(X, poisoned(5), callbacks=[callbacks.TerminateOnNaN()], **options)
    (event,) = recorder.events
    assert np.isnan(event.pop("loss"))
    assert event == {"kind": "nan", "epoch": 0, "step": 2, "rank": 0, "batch": 1}


def on_two_ranks(sample, raise_error=False, epochs=3):
    """Where both ranks end when one sample's target is NaN; samples go to the ranks by halves."""

    def rank(runtime):
        recorder = runtime.events = Recorder()
        x, y = ranks.data()
        y[sample] = np.nan
        seen = Batches()
        own = [callbacks.TerminateOnNaN(raise_error), seen]
        error = None
        try:
            ranks.fit(runtime, own, epochs, train=(x, y))
        except RuntimeError as raised:
            error = str(raised)
        return seen.seen, recorder.events, error

    return ranks.run(rank)


@pytest.mark.parametrize(
    ("sample", "rank", "batch", "last"),
    [(0, 0, 0, 1), (6, 1, 1, 2), (14, 1, 3, 3), (12, 0, 3, 3)],
    ids=["first batch", "another rank's", "last batch of the epoch", "last batch, rank 0"],
)
def test_ranks_end_together(sample, rank, batch, last):
    results = on_two_ranks(sample)
    for seen, events, _ in results:
        assert seen == [(0, b) for b in range(last + 1)]
        (event,) = [e for e in events if e["kind"] == "nan"]
        assert (event["epoch"], event["batch"], event["rank"]) == (0, batch, rank)


def test_ranks_raise_together():
    for _, _, error in on_two_ranks(6, raise_error=True):
        assert error is not None
        assert error.startswith("NaN or Inf loss encountered at batch 1 on rank 1.")


def saving(tmp_path, save=None):
    return callbacks.StoreCheckpoint(
        str(tmp_path / "store"), save=save or EverySteps(2), background=False
    )


def poisoned_once(model, terminate, saver, at=9, epochs=1):
    """Three batches an epoch; the one with the sample is NaN each time."""
    return model.fit(
        X,
        poisoned(at),
        batch_size=4,
        shuffle=False,
        epochs=epochs,
        verbose=0,
        callbacks=[terminate, saver],
    )


def test_rollbacks_in_one_process(tmp_path, capsys):
    model, terminate, saver = make(), callbacks.TerminateOnNaN(rollbacks=2, factor=0.1), None
    saver = saving(tmp_path)
    poisoned_once(model, terminate, saver, epochs=5)
    said = capsys.readouterr().out
    assert (
        "Batch 2: Invalid loss, back to the weights of step 2 with learning_rate 0.01 "
        "(rollback 1 of 2)" in said
    )
    assert "Batch 2: Invalid loss, back to the weights of step 4" in said
    assert "Batch 2: Invalid loss, terminating training" in said
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.001)
    assert terminate.get_state() == {"rollbacks": 2}


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path, capsys):
    seen = Batches()
    terminate, saver = callbacks.TerminateOnNaN(rollbacks=2), saving(tmp_path, EverySteps(50))
    model = make()
    callbacks_ = [terminate, saver, seen]
    model.fit(X, poisoned(5), batch_size=4, shuffle=False, verbose=0, callbacks=callbacks_)
    assert seen.seen == [(0, 0), (0, 1)]
    assert "terminating training" in capsys.readouterr().out


def test_rollbacks_are_remembered():
    terminate = callbacks.TerminateOnNaN(rollbacks=2)
    terminate.set_state({"rollbacks": 2})
    assert terminate.get_state() == {"rollbacks": 2}


def test_moving_statistics_and_accumulated_gradients_go_back(tmp_path):
    """A NaN in either would outlive the weights."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    model.compile(optimizer, "mse", run_eagerly=True)
    x = X.copy()
    x[9] = np.nan
    own = [callbacks.TerminateOnNaN(rollbacks=1), saving(tmp_path, EverySteps(2))]
    model.fit(x, Y, batch_size=4, shuffle=False, verbose=0, callbacks=own)
    assert all(np.isfinite(v.numpy()).all() for v in model.variables + optimizer.variables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollbacks": -1}, "rollbacks is 0 or more"),
        ({"rollbacks": 1, "factor": 0}, "factor above 0 and at most 1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        callbacks.TerminateOnNaN(**options)


def test_rollbacks_need_a_store(tmp_path):
    with pytest.raises(SettingError, match="put a StoreCheckpoint into the callbacks"):
        fit(make(), callbacks.TerminateOnNaN(rollbacks=1))


def test_rollbacks_need_a_rate_that_can_be_set(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model = make(optimizer=keras.optimizers.SGD(schedule))
    with pytest.raises(SettingError, match="is a LearningRateSchedule"):
        fit(model, callbacks.TerminateOnNaN(rollbacks=1), saving(tmp_path))


def test_what_is_not_finite_is_not_saved(tmp_path, capsys):
    """And a training that ended so is not continued from there."""
    saver = saving(tmp_path, EverySteps(1))
    poisoned_once(make(), callbacks.TerminateOnNaN(), saver)
    assert [one.step for one in saver.store.list()] == [1, 2]
    assert re.search(r"Not saved at step 3: \S+ is not finite", capsys.readouterr().out)
    again = callbacks.StoreCheckpoint(saver.store, resume=True)
    fit(make(), again)
    assert "Continuing at epoch 1, batch 3 (step 2)" in capsys.readouterr().out
