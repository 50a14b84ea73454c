"""Warm-up, schedules after it, momentum correction, scaling; Horovod's names for them."""

from __future__ import annotations

import math
from typing import Any, cast

import keras
import numpy as np
import pytest

from orchestrator import SettingError, callbacks, decisions
from tests.callbacks import ranks
from tests.callbacks.models import X, Y, fit, make
from tests.callbacks.test_backup_and_restore import Interrupt, end
from tests.callbacks.test_learning_rate_scheduler import two_optimizers


class Rates(keras.callbacks.Callback):
    """The rate of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float(self.model.optimizer.learning_rate.numpy()))


def sgd(rate=0.01, momentum=0.9, **options):
    return keras.optimizers.SGD(rate, momentum, **options)


def rates_of(*own, epochs, optimizer=None, rates=None, **options):
    rates = rates or Rates()
    history = fit(make(optimizer=optimizer or sgd()), *own, rates, epochs=epochs, **options)
    return rates.seen, history.history.get("learning_rate")


def test_linear_by_batches():
    seen, logged = rates_of(callbacks.LearningRateWarmup(2, factor=4), epochs=4)
    expected = [0.01 * (1 + 3 * batch / 6) for batch in range(6)] + [0.04] * 6
    assert seen == pytest.approx(expected)
    assert logged == pytest.approx([expected[2], expected[5], 0.04, 0.04])


def test_the_factor_is_the_number_of_ranks():
    def rank(runtime):
        rates = Rates()
        warmup = callbacks.LearningRateWarmup(2, verbose=1)
        ranks.fit(runtime, [warmup, rates], epochs=3)
        return rates.seen

    first, second = ranks.run(rank)
    assert first == second == pytest.approx([0.01 * (1 + b / 8) for b in range(8)] + [0.02] * 4)


def test_warmed_up_with_local_losses_that_disagree_the_ranks_stay_alike():
    def rank(runtime):
        warmup = callbacks.LearningRateWarmup(2)
        guard = callbacks.ConsistencyGuard(1)
        model = ranks.model(runtime, sgd())
        x, y = ranks.data()
        y = y + np.where(np.arange(16) % 4 < 2, 5, -5).astype("float32")[:, None]
        ranks.fit(runtime, [warmup, guard], epochs=3, model=model, train=(x, y))
        return [v.numpy() for v in (*model.weights, *model.optimizer.variables)]

    first, second = ranks.run(rank)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_schedule_does_after_it():
    own = [
        callbacks.LearningRateWarmup(2, factor=4),
        callbacks.LearningRateScheduler(lambda epoch, lr: lr if epoch < 3 else lr * 0.1),
    ]
    seen, _ = rates_of(*own, epochs=5)
    assert seen[:9] == pytest.approx([0.01 * (1 + b / 2) for b in range(6)] + [0.04] * 3)
    assert seen[9:] == pytest.approx([0.004] * 3 + [0.0004] * 3)


def test_a_plateau_after_it():
    own = [
        callbacks.LearningRateWarmup(1, factor=2),
        callbacks.ReduceLROnPlateau(patience=2, min_delta=100),
    ]
    seen, _ = rates_of(*own, epochs=4)
    assert seen[3:] == pytest.approx([0.02] * 6 + [0.002] * 3)


def by_hand(rates, correct):
    """SGD with momentum on x -> w, in float64: v = m r v - rate g; w += v."""
    x = np.float64(X[:4])
    w, v, before = np.zeros((3, 1)), np.zeros((3, 1)), rates[0]
    for rate in rates:
        gradient = 2 * x.T @ (x @ w - Y[:4]) / 4
        v = 0.9 * (rate / before if correct else 1.0) * v - rate * gradient
        w, before = w + v, rate
    return w


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_momentum_correction(correct, scaled):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign(np.zeros((3, 1)))
    optimizer = keras.optimizers.LossScaleOptimizer(sgd()) if scaled else sgd()
    model.compile(optimizer, "mse", jit_compile=False)
    rates = Rates()
    warmup = callbacks.LearningRateWarmup(3, factor=8, momentum_correction=correct)
    model.fit(X[:4], Y[:4], 4, epochs=4, verbose=0, callbacks=[warmup, rates])
    assert rates.seen == pytest.approx([0.01 * (1 + 7 * e / 3) for e in range(3)] + [0.08])
    ours = model.get_weights()[0]
    np.testing.assert_allclose(ours, by_hand(rates.seen, correct), rtol=1e-4)
    assert np.abs(ours - by_hand(rates.seen, not correct)).max() > 1e-3


def test_rmsprop_is_corrected_and_adam_left_alone():
    from orchestrator.callbacks import rates

    for optimizer, expected in (
        (keras.optimizers.RMSprop(0.1, momentum=0.9), 2.0),
        (keras.optimizers.Adam(0.1), 1.0),
        (keras.optimizers.SGD(0.1), None),
    ):
        variable = keras.Variable(np.zeros(2, "float32"))
        optimizer.build([variable])
        velocities = getattr(optimizer, "_momentums", None) or []
        for velocity in velocities:
            velocity.assign([1.0, 1.0])
        rates.set_learning_rate(optimizer, 0.2, momentum_correction=True)
        assert float(optimizer.learning_rate.numpy()) == pytest.approx(0.2)
        assert [float(v.numpy()[0]) for v in velocities] == ([expected] if expected else [])


def test_each_of_several_optimizers_from_its_own_rate():
    history = fit(
        make(optimizer=two_optimizers()), callbacks.LearningRateWarmup(1, factor=3), epochs=2
    ).history
    assert history["learning_rate_all"][1] == pytest.approx(0.3)
    assert history["learning_rate_biases"][1] == pytest.approx(0.03)


@pytest.mark.parametrize("after", [2, 5, 7, 8])
def test_a_run_that_is_continued(tmp_path, after):
    def run(*others):
        rates = Rates()
        scheduler = callbacks.LearningRateScheduler(lambda e, lr: lr / 2 if e == 2 else lr)
        model = make(optimizer=sgd())
        fit(
            *(model, callbacks.LearningRateWarmup(2, factor=4), scheduler, rates, *others), epochs=4
        )
        return rates.seen, model.get_weights()

    saver = callbacks.BackupAndRestore(str(tmp_path), 1)
    with pytest.raises(InterruptedError):
        run(saver, Interrupt(after))
    end(saver)
    rates, weights = run(callbacks.BackupAndRestore(str(tmp_path), 1))
    whole, expected = run()
    assert rates == whole[after - 1 :] or rates == whole[after:]
    for a, b in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (lambda: callbacks.LearningRateWarmup(0), SettingError, "epochs=0"),
        (lambda: callbacks.LearningRateWarmup(factor=0), SettingError, "factor=0"),
        (lambda: callbacks.LearningRateWarmupCallback(None), SettingError, "needs initial_lr"),
        (
            lambda: callbacks.BroadcastGlobalVariables(1),
            SettingError,
            r"root_rank=1\) is not allowed",
        ),
        (
            lambda: callbacks.BroadcastGlobalVariables(0, "", cast(Any, object())),
            SettingError,
            r"local_variables=\.\.\.\), 1 of them, is not allowed",
        ),
    ],
)
def test_bad_arguments(own, error, message):
    with pytest.raises(error, match=message):
        own()


def test_epochs_of_unknown_length():
    warmup = callbacks.LearningRateWarmup(1, factor=2)
    warmup.set_model(make())
    warmup.set_params({"epochs": 1, "steps": None})
    warmup.on_train_begin()
    warmup.on_epoch_begin(0)
    with pytest.raises(SettingError, match="give steps_per_epoch"):
        warmup.on_train_batch_begin(0)


def test_an_optimizer_with_a_schedule():
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    with pytest.raises(TypeError, match="created with a `LearningRateSchedule`"):
        fit(make(optimizer=keras.optimizers.SGD(schedule)), callbacks.LearningRateWarmup(1))


# Horovod's names, and its formulas: lr(epoch) = lr / size * (epoch * (size - 1) / warmup + 1).


def test_horovods_warmup_and_schedules():
    def rank(runtime):
        rates = Rates()
        own = [
            callbacks.BroadcastGlobalVariablesCallback(0),
            callbacks.MetricAverageCallback(),
            callbacks.LearningRateWarmupCallback(0.02, warmup_epochs=2, verbose=1),
            callbacks.LearningRateScheduleCallback(
                0.02, multiplier=1.0, start_epoch=2, end_epoch=3
            ),
            callbacks.LearningRateScheduleCallback(0.02, multiplier=0.1, start_epoch=3),
            rates,
        ]
        history = ranks.fit(runtime, own, epochs=5)
        return rates.seen, history.history

    (first, history), (second, same) = ranks.run(rank)
    assert history == same
    warmup = [0.02 / 2 * ((batch + 1) / 4 * (2 - 1) / 2 + 1) for batch in range(8)]
    assert first == second == pytest.approx(warmup + [0.02] * 4 + [0.002] * 8)
    assert history["learning_rate"] == pytest.approx([warmup[3], 0.02, 0.02, 0.002, 0.002])


def test_horovods_multiplier_as_a_function():
    smooth = callbacks.LearningRateScheduleCallback(0.1, lambda e: 0.5**e, staircase=False)
    seen, _ = rates_of(smooth, epochs=2)
    assert seen == pytest.approx([0.1 * 0.5 ** (batch / 3) for batch in range(6)])
    stairs = callbacks.LearningRateScheduleCallback(0.1, lambda e: 0.5**e, start_epoch=1)
    seen, _ = rates_of(stairs, epochs=3)
    assert seen == pytest.approx([0.01] * 3 + [0.05] * 3 + [0.025] * 3)


def test_broadcasting_is_what_the_runtime_does():
    def rank(runtime):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.layers[0].kernel.assign(np.full((2, 1), runtime.rank))
        optimizer = runtime.distribute(keras.optimizers.SGD(0.0))
        optimizer.apply.reduction = optimizer.apply.reduction._replace(name="ranks")
        model.compile(optimizer, "mse", metrics=["mae"])
        ranks.fit(runtime, [callbacks.BroadcastGlobalVariables()], epochs=1, model=model)
        return model.get_weights()[0]

    first, second = ranks.run(rank)
    np.testing.assert_array_equal(first, np.zeros((2, 1)))
    np.testing.assert_array_equal(second, first)


def test_metric_average_is_the_one_global_metrics():
    def rank(runtime):
        average = callbacks.MetricAverage()
        seen = []
        look = callbacks.LambdaCallback(
            on_train_begin=lambda logs: seen.extend(look_list(look)),
        )
        ranks.fit(runtime, [look, average], epochs=1)
        return [type(one).__name__ for one in seen]

    for names in ranks.run(rank):
        assert names[0] == "MetricAverage"
        assert "GlobalMetrics" not in names


def look_list(callback):
    from orchestrator.callbacks.global_metrics import members

    return members()


def test_scaling():
    assert callbacks.scaled_learning_rate(0.1) == 0.1  # one process
    assert callbacks.scaled_learning_rate(0.1, factor=16) == pytest.approx(1.6)
    assert callbacks.scaled_learning_rate(0.1, "sqrt", factor=16) == pytest.approx(0.4)
    assert ranks.run(lambda runtime: callbacks.scaled_learning_rate(0.1)) == [0.2, 0.2]
    assert ranks.run(lambda runtime: callbacks.scaled_learning_rate(0.1, "sqrt"))[1] == (
        pytest.approx(0.1 * math.sqrt(2))
    )
    with pytest.raises(SettingError, match="rule is one of linear, sqrt"):
        callbacks.scaled_learning_rate(0.1, cast(Any, "cubic"))


def test_the_rule():
    assert decisions.warmed_up(1, 8, 5, 0) == 1
    assert decisions.warmed_up(1, 8, 5, 2.5) == 4.5
    assert decisions.warmed_up(1, 8, 5, 5) == decisions.warmed_up(1, 8, 5, 7.5) == 8
