"""ReduceLROnPlateau in one process."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest

from orchestrator import SettingError
from orchestrator.callbacks import ReduceLROnPlateau
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.runtime import Runtime
from tests.callbacks.models import Script, fit, make
from tests.fakes import Recorder


def rate(model: keras.Model) -> float:
    return float(model.optimizer.learning_rate.numpy())


def test_it_cuts():
    model = make()
    history = fit(model, ReduceLROnPlateau(patience=1, factor=0.1, min_delta=100), epochs=2)
    assert rate(model) == pytest.approx(0.01)
    # as in Keras the log has the rate the epoch was trained with
    assert history.history["learning_rate"] == pytest.approx([0.1, 0.1])


def test_min_lr():
    model = make()
    fit(model, ReduceLROnPlateau(patience=1, min_delta=10, min_lr=0.005), epochs=5)
    assert rate(model) == np.float32(0.005)


def test_cooldown():
    model = make()
    callback = ReduceLROnPlateau(patience=1, min_delta=100, cooldown=2)
    history = fit(model, callback, epochs=5)
    assert rate(model) == pytest.approx(0.001)
    expected = [0.1, 0.1, 0.01, 0.01, 0.001]
    assert history.history["learning_rate"] == pytest.approx(expected)


@pytest.mark.parametrize("cooldown", [0, 2])
def test_rates_are_those_of_keras(cooldown):
    values = [5, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3.5, 3]
    rates = []
    for module in (keras.callbacks.ReduceLROnPlateau, ReduceLROnPlateau):
        model = make(run_eagerly=False)
        callback = module(patience=2, factor=0.2, cooldown=cooldown, min_lr=1e-3)
        history = fit(model, Script(values), callback, epochs=len(values))
        rates.append([*history.history["learning_rate"], rate(model)])
    assert rates[0] == rates[1]
    assert rates[0][-1] < 0.1


def test_a_schedule_cannot_be_cut():
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    model = make(optimizer=keras.optimizers.Adam(schedule))
    with pytest.raises(TypeError, match="created with a `LearningRateSchedule`"):
        fit(model, ReduceLROnPlateau(patience=1, min_delta=100), epochs=2)


def test_verbose(capsys):
    fit(make(), ReduceLROnPlateau(patience=1, min_delta=100, verbose=1), epochs=2)
    text = capsys.readouterr().out
    assert "Epoch 2: ReduceLROnPlateau reducing learning rate to 0.01" in text


def test_state_is_reset_by_the_next_fit():
    callback = ReduceLROnPlateau(patience=5, min_delta=100, cooldown=2)
    model = make()
    fit(model, callback, epochs=3)
    assert callback.wait == 2
    assert callback.best is not None
    callback.on_train_begin()
    assert (callback.best, callback.wait, callback.cooldown_counter) == (None, 0, 0)
    fit(model, callback, epochs=3)
    assert callback.wait == 2


def test_nan_first_is_improved_on():
    model = make()
    callback = ReduceLROnPlateau(patience=2)
    fit(model, Script([math.nan, 3.0, 2.0, 1.0]), callback, epochs=4)
    assert (callback.best, callback.wait) == (1.0, 0)
    assert rate(model) == pytest.approx(0.1)


def test_nan_in_the_middle_waits():
    model = make()
    callback = ReduceLROnPlateau(patience=2)
    fit(model, Script([3.0, math.nan, math.nan, 2.0]), callback, epochs=4)
    assert (callback.best, callback.wait) == (2.0, 0)
    assert rate(model) == pytest.approx(0.01)


def test_a_metric_that_is_not_there():
    with pytest.warns(UserWarning, match=r"`val_acc` which is not available.*learning_rate"):
        fit(make(), ReduceLROnPlateau("val_acc", mode="max"))


def test_a_direction_that_cannot_be_inferred():
    with pytest.raises(SettingError, match="mode='max'"):
        fit(make(), ReduceLROnPlateau("val_acc"))


def test_events():
    runtime, recorder = Runtime(SingleCommunicator()), Recorder()
    runtime.events = recorder
    with runtime.use():
        fit(make(), Script([1.0, 2.0, 2.0]), ReduceLROnPlateau(patience=2), epochs=3)
    (event,) = recorder.events
    assert event == {
        "kind": "plateau",
        "epoch": 2,
        "step": 9,
        "rank": 0,
        "monitor": "val_loss",
        "value": 2.0,
        "best": 1.0,
        "variable": "learning_rate",
        "old": pytest.approx(0.1),
        "new": pytest.approx(0.01),
    }
