"""LearningRateScheduler: Keras's behaviour in one process, one answer on two ranks."""

from __future__ import annotations

from typing import Any, cast

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.agreement import RankError
from tests.callbacks import ranks
from tests.callbacks.models import fit, make
from tests.callbacks.test_backup_and_restore import Interrupt, end


def rate(model):
    return float(model.optimizer.learning_rate.numpy())


def test_it_sets_the_rate():
    model = make()
    history = fit(model, callbacks.LearningRateScheduler(lambda epoch, lr: 1.0 / (1.0 + epoch)))
    assert rate(model) == 1.0
    assert history.history["learning_rate"] == [1.0]
    assert type(history.history["learning_rate"][0]) is float


def test_it_is_told_the_rate_before():
    model = make()
    history = fit(model, callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2), epochs=3)
    assert history.history["learning_rate"] == pytest.approx([0.05, 0.025, 0.0125])


def test_a_schedule_of_the_epoch_alone():
    history = fit(make(), callbacks.LearningRateScheduler(lambda epoch: 0.5**epoch), epochs=3)
    assert history.history["learning_rate"] == [1.0, 0.5, 0.25]


def test_verbose(capsys):
    fit(make(), callbacks.LearningRateScheduler(lambda epoch, lr: 0.5, verbose=1))
    text = capsys.readouterr().out
    assert "Epoch 1: LearningRateScheduler setting learning rate to 0.5." in text


def test_what_is_no_float():
    with pytest.raises(ValueError, match="should be a float"):
        fit(make(), callbacks.LearningRateScheduler(lambda epoch, lr: "much"))


def test_an_optimizer_with_a_schedule():
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10)
    model = make(optimizer=keras.optimizers.Adam(schedule))
    with pytest.raises(TypeError, match="created with a `LearningRateSchedule`"):
        fit(model, callbacks.LearningRateScheduler(lambda epoch, lr: 0.5))


def two_optimizers():
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.1, name="all"),
            {".*bias": keras.optimizers.Adam(0.01, name="biases")},
        )
    )


def test_each_of_several_optimizers(tmp_path, capsys):
    scheduler = callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2, verbose=1)
    log = callbacks.CSVLogger(str(tmp_path / "log.csv"))
    history = fit(make(optimizer=two_optimizers()), scheduler, log, epochs=2).history
    assert history["learning_rate_all"] == pytest.approx([0.05, 0.025])
    assert history["learning_rate_biases"] == pytest.approx([0.005, 0.0025])
    assert "setting biases learning rate to 0.0049" in capsys.readouterr().out
    header = (tmp_path / "log.csv").read_text().splitlines()[0]
    assert header.count("learning_rate_all") == 1
    assert "learning_rate," not in header


def test_each_of_several_optimizers_is_cut_on_a_plateau():
    plateau = callbacks.ReduceLROnPlateau(patience=1, min_delta=100)
    history = fit(make(optimizer=two_optimizers()), plateau, epochs=3).history
    assert history["learning_rate_all"] == pytest.approx([0.1, 0.1, 0.01])
    assert history["learning_rate_biases"] == pytest.approx([0.01, 0.01, 0.001])


def test_a_random_schedule_is_drawn_once_for_all():
    def rank(runtime):
        generator = np.random.default_rng(runtime.rank)
        scheduler = callbacks.LearningRateScheduler(lambda epoch, lr: float(generator.random()))
        guard = callbacks.ConsistencyGuard()
        return ranks.fit(runtime, [scheduler, guard], epochs=3).history["learning_rate"]

    first, second = ranks.run(rank)
    assert first == second
    assert first == pytest.approx(np.random.default_rng(0).random(3).tolist(), rel=1e-6)


def test_an_error_is_raised_on_both_ranks():
    def rank(runtime):
        scheduler = callbacks.LearningRateScheduler(cast(Any, lambda epoch, lr: 1))
        with pytest.raises(RankError if runtime.rank else ValueError, match="should be a float"):
            ranks.fit(runtime, [scheduler])

    ranks.run(rank)


def test_an_epoch_gone_on_with_is_not_scheduled_twice(tmp_path):
    def run(*others):
        scheduler = callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)
        return fit(make(), scheduler, *others, epochs=3).history["learning_rate"]

    saver = callbacks.BackupAndRestore(str(tmp_path), 1)
    with pytest.raises(InterruptedError):
        run(saver, Interrupt(5))  # in the middle of the second epoch
    end(saver)
    assert run(callbacks.BackupAndRestore(str(tmp_path), 1)) == pytest.approx([0.05, 0.025, 0.0125])
