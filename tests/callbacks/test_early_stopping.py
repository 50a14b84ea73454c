"""EarlyStopping in one process: what Keras's own tests ask of it, and what ours adds."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest

from orchestrator import SettingError
from orchestrator.callbacks import EarlyStopping
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.runtime import Runtime
from tests.callbacks import ranks
from tests.callbacks.models import FakeModel, Script, fit, make
from tests.fakes import FakeCommunicator, Recorder


def drive(
    stopper: EarlyStopping,
    values,
    name: str = "val_loss",
    stop_at: int | None = None,
    state=None,
    first: int = 0,
):
    """Runs epochs by hand, gone on with from `state`; returns the model and how many were run."""
    model, ran = FakeModel(), 0
    stopper.set_model(model)
    stopper.on_train_begin()
    if state is not None:
        stopper.set_state(state)
    for epoch, value in enumerate(values, first):
        ran += 1
        model.epoch = epoch
        stopper.on_epoch_end(epoch, {name: value})
        if epoch == stop_at:
            model.stop_training = True
        if model.stop_training:
            break
    stopper.on_train_end()
    return model, ran


@pytest.mark.parametrize(
    ("mode", "monitor", "expected"),
    [
        ("max", "val_mse", "max"),
        ("min", "val_loss", "min"),
        ("auto", "val_mse", "min"),
        ("auto", "loss", "min"),
        ("auto", "val_loss", "min"),
        ("auto", "accuracy", "max"),
        ("auto", "val_accuracy", "max"),
        ("auto", "hinge", "min"),
        ("auto", "val_auc", "max"),
    ],
)
def test_direction(mode, monitor, expected):
    model = make(metrics=["mse", "accuracy", "hinge", keras.metrics.AUC(name="auc")])
    stopper = EarlyStopping(monitor, mode=mode, patience=5)
    fit(model, stopper)
    assert stopper._improvement().mode == expected
    assert stopper.monitor_op is (keras.ops.less if expected == "min" else keras.ops.greater)


@pytest.mark.parametrize("monitor", ["unknown", "val_unknown", "mine"])
def test_a_direction_that_cannot_be_inferred(monitor):
    mine = keras.metrics.MeanMetricWrapper(lambda y, p: p, name="mine")
    with pytest.raises(SettingError, match=f"(?s){monitor}.*mode='max'.*mode='min'"):
        fit(make(metrics=[mine]), EarlyStopping(monitor))


@pytest.mark.parametrize("patience", [0, 1, 2, 3])
def test_patience(patience):
    stopper = EarlyStopping("loss", patience=patience)
    drive(stopper, [10.0, 9.0, 8.0, 9.0, 8.9, 8.8, 8.7, 8.6, 8.5], "loss")
    assert stopper.stopped_epoch == max(patience, 1) + 2
    assert (stopper.best, stopper.best_epoch) == (8.0, 2)


def test_best_weights_come_back():
    stopper = EarlyStopping(patience=2, restore_best_weights=True)
    model, ran = drive(stopper, [0.2, 0.15, 0.1, 0.11, 0.12, 0.01])
    assert (ran, model.epoch, stopper.restored_epoch) == (5, 2, 2)


def test_without_restore_the_last_weights_stay():
    stopper = EarlyStopping(patience=2)
    model, ran = drive(stopper, [0.2, 0.15, 0.1, 0.11, 0.12, 0.01])
    assert (ran, model.epoch, stopper.restored_epoch) == (5, 4, None)
    assert stopper.best_weights is None


def test_no_epoch_beats_the_baseline():
    stopper = EarlyStopping(patience=5, baseline=0.5, restore_best_weights=True)
    model, ran = drive(stopper, [0.9, 0.8, 0.7, 0.71, 0.72, 0.73])
    assert (ran, model.epoch) == (5, 2)


def test_another_callback_stops_the_training():
    stopper = EarlyStopping(patience=5, restore_best_weights=True)
    model, ran = drive(stopper, [0.9, 0.8, 0.7, 0.71, 0.72], stop_at=3)
    assert (ran, model.epoch, stopper.stopped_epoch) == (4, 2, 0)


def test_the_last_epoch_is_the_best():
    stopper = EarlyStopping(patience=5, restore_best_weights=True)
    model, ran = drive(stopper, [0.9, 0.8, 0.7])
    assert (ran, model.epoch, stopper.restored_epoch) == (3, 2, 2)


def test_start_from_epoch():
    stopper = EarlyStopping(patience=1, start_from_epoch=2, restore_best_weights=True)
    model, ran = drive(stopper, [0.1, 0.1, 0.9, 0.8, 0.85])
    assert (ran, model.epoch) == (5, 3)


def test_nan_first_is_improved_on():
    stopper = EarlyStopping(patience=3, restore_best_weights=True)
    model, ran = drive(stopper, [math.nan, 0.9, 0.8, math.nan, 0.85, 0.9])
    assert (ran, model.epoch, stopper.best) == (6, 2, 0.8)


def test_only_nan_restores_the_first_epoch():
    stopper = EarlyStopping(patience=2, restore_best_weights=True)
    model, ran = drive(stopper, [math.nan] * 5)
    assert (ran, model.epoch, stopper.best) == (2, 0, None)


def test_state_is_reset_by_the_next_fit():
    stopper = EarlyStopping("loss", patience=3, restore_best_weights=True)
    drive(stopper, [1, 2, 3, 4, 5], "loss")
    assert (stopper.best, stopper.wait, stopper.stopped_epoch) == (1, 3, 3)
    stopper.on_train_begin()
    assert stopper.best is None
    assert (stopper.wait, stopper.stopped_epoch, stopper.best_epoch) == (0, 0, 0)
    assert (stopper.best_weights, stopper.restored_epoch) == (None, None)


def saved(values, restore: bool, state=None, first: int = 0):
    """The state of a run that was interrupted after these epochs."""
    stopper = EarlyStopping(patience=9, restore_best_weights=restore)
    drive(stopper, values, state=state, first=first)
    return stopper.get_state()


@pytest.mark.parametrize(
    ("values", "restored", "best"),
    [([0.3, 0.2, 0.4], 2, 0.1), ([0.3, 0.05, 0.2, 0.3, 0.3], 3, 0.05), ([], None, 0.1)],
)
def test_weights_that_were_not_kept_are_not_restored(values, restored, best):
    """Saved without `restore_best_weights`: as in Keras, the first ones there are count as best."""
    stopper = EarlyStopping(patience=3, restore_best_weights=True)
    model, ran = drive(stopper, values, state=saved([0.5, 0.1], restore=False), first=2)
    assert (ran, stopper.restored_epoch, stopper.best) == (len(values), restored, best)
    assert model.epoch == (-1 if restored is None else restored)


def test_weights_of_an_earlier_best_are_forgotten_where_none_are_kept():
    kept = saved([0.5, 0.4], restore=True)
    without = saved([0.1, 0.2], restore=False, state=kept, first=2)
    stopper = EarlyStopping(patience=1, restore_best_weights=True)
    model, _ = drive(stopper, [0.3], state=without, first=4)
    assert (model.epoch, stopper.restored_epoch) == (4, 4)


def test_ranks_restore_alike_where_none_were_kept():
    """Rank 1's own weights are others: both end with rank 0's."""
    state = saved([0.5, 0.1], restore=False)

    def rank(runtime):
        stopper = EarlyStopping(patience=2, restore_best_weights=True)
        model = FakeModel()
        keras.callbacks.Callback.set_model(stopper, model)
        stopper.on_train_begin()
        stopper.set_state(state)
        for epoch, value in enumerate([0.3, 0.2], 2):
            model.epoch = epoch + 100 * runtime.rank
            stopper.on_epoch_end(epoch, {"val_loss": value})
        assert model.stop_training
        stopper.on_train_end()
        return model.epoch

    assert ranks.run(rank) == [2, 2]


def test_restored_epoch_is_there_from_the_start():
    assert EarlyStopping().restored_epoch is None


def test_a_metric_that_is_not_there():
    stopper = EarlyStopping("val_acc", mode="max")
    with pytest.warns(UserWarning, match=r"`val_acc` which is not available.*val_loss"):
        model, ran = drive(stopper, [0.9, 0.8])
    assert (ran, model.stop_training) == (2, False)


def test_min_delta_is_not_flipped_twice():
    """Keras changes the sign in place; a callback used again must not."""
    stopper = EarlyStopping("loss", min_delta=0.5, patience=1)
    for _ in range(2):
        _, ran = drive(stopper, [1.0, 0.4, 0.1, 0.05], "loss")
        assert (ran, stopper.best) == (3, 0.4)


def test_in_fit_with_events():
    runtime, recorder = Runtime(SingleCommunicator()), Recorder()
    runtime.events = recorder
    stopper = EarlyStopping(patience=2, restore_best_weights=True)
    model, seen = make(), {}
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.update({epoch: model.get_weights()})
    )
    with runtime.use():
        history = fit(model, Script([3.0, 1.0, 2.0, 2.0, 0.0]), stopper, keep, epochs=5)
    assert history.epoch == [0, 1, 2, 3]
    for mine, best in zip(model.get_weights(), seen[1], strict=True):
        np.testing.assert_array_equal(mine, best)
    assert recorder.kinds() == ["best", "best", "stop", "restore"]
    assert recorder.events[2] == {
        "kind": "stop",
        "epoch": 3,
        "step": 12,
        "rank": 0,
        "monitor": "val_loss",
        "value": 2.0,
        "best": 1.0,
        "best_epoch": 1,
        "patience": 2,
    }
    assert (recorder.events[3]["epoch"], recorder.events[3]["value"]) == (1, 1.0)


def test_verbose_speaks_keras(capsys):
    stopper = EarlyStopping(patience=1, restore_best_weights=True, verbose=1)
    drive(stopper, [1.0, 2.0])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Epoch 2: early stopping",
        "Restoring model weights from the end of the best epoch: 1.",
    ]


def test_only_the_root_keeps_weights_and_restores_by_broadcast():
    """A rank but 0 holds nothing, and ends with what rank 0 sends."""
    sent = np.array([7]).view(np.uint8)
    communicator = FakeCommunicator(1, 2, broadcast=lambda _: sent)
    with Runtime(communicator).use():
        stopper = EarlyStopping(patience=1, restore_best_weights=True)
        model = FakeModel()
        stopper._runtime = Runtime(communicator)
        keras.callbacks.Callback.set_model(stopper, model)
        stopper.on_train_begin()
        for epoch, value in enumerate([1.0, 2.0]):
            model.epoch = epoch
            stopper.on_epoch_end(epoch, {"val_loss": value})
        assert stopper.best_weights is None
        assert model.stop_training
        assert communicator.calls == []
        stopper.on_train_end()
    assert model.epoch == 7
    assert communicator.calls == ["broadcast"]
