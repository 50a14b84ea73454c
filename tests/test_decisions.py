"""Decisions: tables of states in and decisions out, and parity with Keras's own callbacks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.decisions import (
    BatchCount,
    Improvement,
    PlateauRule,
    PlateauState,
    StopRule,
    StopState,
    batches_due,
    early_stopping,
    plateau,
    slow_ranks,
)

NAN = math.nan
MIN, MAX = Improvement("min"), Improvement("max")


# -- improvement ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "current", "reference", "better"),
    [
        (MIN, 1.0, None, True),
        (MIN, 1.0, 2.0, True),
        (MIN, 2.0, 2.0, False),
        (MIN, 3.0, 2.0, False),
        (MAX, 3.0, 2.0, True),
        (MAX, 2.0, 2.0, False),
        (Improvement("min", 0.5), 1.5, 2.0, False),  # a change of min_delta is none
        (Improvement("min", 0.5), 1.25, 2.0, True),
        (Improvement("max", 0.5), 2.5, 2.0, False),
        (Improvement("max", 0.5), 2.75, 2.0, True),
        (MIN, NAN, None, False),
        (MIN, NAN, 2.0, False),
        (MIN, 1e30, NAN, True),
        (MAX, -1e30, NAN, True),
        (MIN, math.inf, None, True),
        (MIN, -math.inf, 0.0, True),
        (MIN, math.inf, math.inf, False),
        # What Keras compares are float32: an accuracy of 6 in 10 is no better than 0.6.
        (MAX, float(np.float32(0.6)), 0.6, False),
        (MIN, float(np.float32(0.1)), 0.1, False),
        (MIN, 1e39, 1e40, False),  # both infinite in float32
    ],
)
def test_improvement(rule, current, reference, better):
    assert rule(current, reference) is better


# -- early stopping ------------------------------------------------------------------------------


def run_stop(rule: StopRule, values: list[float]) -> tuple[StopState, int | None, list[int]]:
    """The last state, the epoch of the stop, and the epochs whose weights are kept."""
    state, kept = StopState(), []
    for epoch, value in enumerate(values):
        decision = early_stopping(rule, state, epoch, value)
        state = decision.state
        kept += [epoch] if decision.keep else []
        if decision.stop:
            return state, epoch, kept
    return state, None, kept


@pytest.mark.parametrize(
    ("rule", "values", "stop", "best_epoch", "kept"),
    [
        (StopRule(MIN), [10, 9, 8, 9, 8.9], 3, 2, [0, 1, 2]),
        (StopRule(MIN, patience=1), [10, 9, 8, 9, 8.9], 3, 2, [0, 1, 2]),
        (StopRule(MIN, patience=2), [10, 9, 8, 9, 8.9], 4, 2, [0, 1, 2]),
        (StopRule(MIN, patience=3), [10, 9, 8, 9, 8.9], None, 2, [0, 1, 2]),
        (StopRule(MAX, patience=2), [0.1, 0.3, 0.2, 0.3, 0.4], 3, 1, [0, 1]),
        # patience 0 does not stop in the first epoch
        (StopRule(MIN), [1, 1], 1, 0, [0]),
        # warm-up epochs are not looked at, not even for the best
        (StopRule(MIN, patience=1, start_from_epoch=2), [0, 0, 5, 6], 3, 2, [2]),
        # while none beats the baseline, waiting goes on, and the best is still kept
        (StopRule(MIN, patience=3, baseline=0.5), [0.9, 0.8, 0.7, 0.71], 3, 2, [0, 1, 2]),
        (StopRule(MIN, patience=3, baseline=0.5), [0.9, 0.4, 0.7, 0.7, 0.7], 4, 1, [0, 1]),
        # a slow creep below min_delta is no improvement
        (StopRule(Improvement("min", 0.1), patience=2), [1.0, 0.95, 0.92], 2, 0, [0]),
        # NaN first: later finite values improve on it
        (StopRule(MIN, patience=2), [NAN, 3, 4, 2, 5, 6], 5, 3, [0, 1, 3]),
        (StopRule(MAX, patience=2), [NAN, 3, 4, 2, 1], 4, 2, [0, 1, 2]),
        # NaN in the middle waits, and does not become the best
        (StopRule(MIN, patience=2), [3, NAN, 2, NAN, NAN, 1], 4, 2, [0, 2]),
        # only NaN: stops, and the first epoch's weights are the ones to restore
        (StopRule(MIN, patience=2), [NAN, NAN, NAN], 1, 0, [0]),
    ],
)
def test_early_stopping_tables(rule, values, stop, best_epoch, kept):
    state, stopped, keeps = run_stop(rule, values)
    assert (stopped, state.best_epoch, keeps) == (stop, best_epoch, kept)
    assert state.stopped_epoch == (stop or 0)


def test_early_stopping_from_a_hand_built_state():
    rule = StopRule(MIN, patience=5)
    state = StopState(best=1.0, best_epoch=7, wait=4)
    decision = early_stopping(rule, state, 12, 1.5)
    assert decision == (StopState(1.0, 7, 5, 12), False, False, True)
    decision = early_stopping(rule, state, 12, 0.5)
    assert decision == (StopState(0.5, 12, 0, 0), True, True, False)
    assert state == StopState(best=1.0, best_epoch=7, wait=4)


# -- plateau -------------------------------------------------------------------------------------

PLATEAU = PlateauRule(MIN, factor=0.5, patience=2, cooldown=3)


@pytest.mark.parametrize(
    ("state", "value", "after", "reduce"),
    [
        (PlateauState(), 5.0, PlateauState(5.0, 0, 0), False),
        (PlateauState(5.0, 0, 0), 5.0, PlateauState(5.0, 1, 0), False),
        (PlateauState(5.0, 1, 0), 5.0, PlateauState(5.0, 0, 3), True),
        # mid-cooldown: the counter falls, nothing is waited for
        (PlateauState(5.0, 0, 3), 6.0, PlateauState(5.0, 0, 2), False),
        (PlateauState(5.0, 0, 2), 4.0, PlateauState(4.0, 0, 1), False),
        # its last epoch counts already, as in Keras
        (PlateauState(5.0, 0, 1), 6.0, PlateauState(5.0, 1, 0), False),
        # an improvement ends the wait
        (PlateauState(5.0, 1, 0), 4.0, PlateauState(4.0, 0, 0), False),
        (PlateauState(NAN, 1, 0), 9.0, PlateauState(9.0, 0, 0), False),
        (PlateauState(5.0, 1, 0), NAN, PlateauState(5.0, 0, 3), True),
        (PlateauState(None, 0, 0), NAN, PlateauState(None, 1, 0), False),
    ],
)
def test_plateau_tables(state, value, after, reduce):
    assert plateau(PLATEAU, state, value, reducible=True) == (after, reduce)


def test_a_cut_that_changes_nothing_resets_nothing():
    decision = plateau(PLATEAU, PlateauState(5.0, 1, 0), 5.0, reducible=False)
    assert decision == (PlateauState(5.0, 2, 0), False)


@pytest.mark.parametrize(
    ("rate", "min_lr", "after"),
    [
        (0.1, 0.0, 0.05),
        (0.1, 0.08, 0.08),
        (0.08, 0.08, None),
        (float(np.float32(0.08)), 0.08, None),  # a rounding above
        (float(np.float32(1e-5)), 1e-5, None),
        (0.01, 0.08, None),
        (0.0, 0.0, None),
    ],
)
def test_reduced_rate(rate, min_lr, after):
    assert PlateauRule(MIN, factor=0.5, min_lr=min_lr).reduced(rate) == after


# -- parity with Keras ---------------------------------------------------------------------------
# Any finite float32; subnormals are left out, which TensorFlow's kernels take for zero.

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
near = st.sampled_from([float(np.float32(x)) for x in (0.1, 0.5, 0.6, 0.60000005, 0.7, 0.9, 1.0)])
sequences = st.lists(st.one_of(near, numbers), min_size=1, max_size=12)
deltas = st.one_of(st.just(0.0), st.sampled_from([1e-4, 1e-3, 0.1, 0.25]))
modes = st.sampled_from(["min", "max"])


class FakeModel:
    """Weights that name the epoch they are of, and a learning rate held as a float32."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        self.stop_training = False
        self.epoch = -1
        self.optimizer = SimpleNamespace(learning_rate=np.float32(learning_rate))

    def get_weights(self) -> int:
        return self.epoch

    def set_weights(self, weights: int) -> None:
        self.epoch = weights


@settings(max_examples=150, deadline=None)
@example([0.6, float(np.float32(0.6))], "max", 0.0, 1, 0.6, 0)
@example([1.0, 0.9, 0.8, 0.70000005], "min", 0.1, 1, None, 0)
@given(
    values=sequences,
    mode=modes,
    min_delta=deltas,
    patience=st.integers(0, 4),
    baseline=st.one_of(st.none(), st.sampled_from([0.5, 0.6, 0.7])),
    start=st.integers(0, 4),
)
def test_early_stopping_is_keras(values, mode, min_delta, patience, baseline, start):
    theirs: Any = keras.callbacks.EarlyStopping(
        "loss",
        min_delta=min_delta,
        patience=patience,
        mode=mode,
        baseline=baseline,
        restore_best_weights=True,
        start_from_epoch=start,
    )
    model = FakeModel()
    theirs.set_model(model)
    theirs.on_train_begin()
    rule = StopRule(Improvement(mode, min_delta), patience, baseline, start)
    state, kept = StopState(), None
    for epoch, value in enumerate(values):
        model.epoch = epoch
        theirs.on_epoch_end(epoch, {"loss": value})
        decision = early_stopping(rule, state, epoch, value)
        state = decision.state
        kept = epoch if decision.keep else kept
        assert (state.best, state.wait) == (theirs.best, theirs.wait)
        assert (state.best_epoch or 0) == theirs.best_epoch
        assert kept == theirs.best_weights
        assert decision.stop == model.stop_training
        assert state.stopped_epoch == theirs.stopped_epoch
        if decision.stop:
            break


@settings(max_examples=150, deadline=None)
@given(
    values=sequences,
    mode=modes,
    min_delta=deltas,
    factor=st.sampled_from([0.1, 0.2, 0.5, 0.9]),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    min_lr=st.sampled_from([0.0, 1e-5, 0.01, 0.05, 0.1, 0.3]),
)
def test_plateau_is_keras(values, mode, min_delta, factor, patience, cooldown, min_lr):
    theirs: Any = keras.callbacks.ReduceLROnPlateau(
        "loss",
        factor=factor,
        patience=patience,
        mode=mode,
        min_delta=min_delta,
        cooldown=cooldown,
        min_lr=min_lr,
    )
    model = FakeModel()
    theirs.set_model(model)
    theirs.on_train_begin()
    rule = PlateauRule(Improvement(mode, min_delta), factor, patience, cooldown, min_lr)
    state, rate = PlateauState(), np.float32(0.1)
    for epoch, value in enumerate(values):
        theirs.on_epoch_end(epoch, {"loss": value})
        model.optimizer.learning_rate = np.float32(model.optimizer.learning_rate)
        new = rule.reduced(float(rate))
        state, reduce = plateau(rule, state, value, reducible=new is not None)
        if reduce:
            assert new is not None
            rate = np.float32(new)
        assert state == (theirs.best, theirs.wait, theirs.cooldown_counter)
        assert rate == model.optimizer.learning_rate


# -- every so many batches -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "every", "due"),
    [
        ([0, 1, 2, 3, 4], 2, [1, 3]),
        ([0, 1, 2, 0, 1, 2], 4, [3]),  # counts on over the epoch's end
        ([0, 0, 0], 2, [1]),  # epochs of one batch
        ([3, 7, 11, 3, 7], 8, [1, 3]),  # steps_per_execution=4
        ([0, 1], 1, [0, 1]),
        ([9, 19], 5, [0, 1]),  # never more often than it is asked
    ],
)
def test_batches_due(batches, every, due):
    state, seen = BatchCount(), []
    for index, batch in enumerate(batches):
        state, now = batches_due(state, batch, every)
        seen += [index] if now else []
    assert seen == due


@settings(max_examples=100, deadline=None)
@given(
    epochs=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=4),
    every=st.integers(1, 12),
)
def test_batches_due_is_keras(epochs, every):
    theirs: Any = keras.callbacks.ModelCheckpoint("x.keras", save_freq=every)
    state = BatchCount()
    for strides in epochs:
        batch = -1
        for stride in strides:
            batch += stride
            state, due = batches_due(state, batch, every)
            assert due == theirs._should_save_on_batch(batch)


@pytest.mark.parametrize(
    ("own", "total", "slow"),
    [
        pytest.param([1, 1, 1, 3], 4, {3: 3.0}, id="one"),
        pytest.param([3, 1], 4, {0: 3.0}, id="of two"),
        pytest.param([3, 3, 1, 1, 1], 4, {0: 3.0, 1: 3.0}, id="two of five"),
        pytest.param([3, 3, 3, 1], 4, {}, id="most: one is fast"),
        pytest.param([2, 1, 1], 4, {}, id="twice is not more than twice"),
        pytest.param([9, 3, 1, 1], 9, {0: 9.0}, id="nobody waits for the second slowest"),
        pytest.param([0.003, 0.0011], 0.004, {}, id="below what can be measured"),
        pytest.param([0.3, 0.1, 0.1], 4, {}, id="it costs next to nothing"),
        pytest.param([2, 0, 0], 4, {0: math.inf}, id="the others do nothing"),
        pytest.param([5], 4, {}, id="alone"),
    ],
)
def test_slow_ranks(own, total, slow):
    assert slow_ranks(own, total, 2.0) == slow
