"""SwapEMAWeights: Keras's behaviour in one process; averages of all ranks on two."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from tests.callbacks import ranks
from tests.callbacks.models import X, Y, fit, make
from tests.callbacks.test_backup_and_restore import Interrupt, end
from tests.callbacks.test_learning_rate_scheduler import two_optimizers
from tests.distributed.problems import StopAfter


def ema(**options):
    return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9, **options)


def averages(model):
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return [np.array(a.numpy()) for a in optimizer._model_variables_moving_average]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


class Keep(keras.callbacks.Callback):
    """The weights as each epoch begins and ends, and as validation begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list] = {"begin": [], "end": [], "test": [], "averages": []}

    def on_epoch_begin(self, epoch, logs=None):
        self.kept["begin"].append(self.model.get_weights())

    def on_test_begin(self, logs=None):
        self.kept["test"].append(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self.kept["end"].append(self.model.get_weights())
        self.kept["averages"].append(averages(self.model))


def several():
    """Averages of some of the weights."""
    biases = keras.optimizers.Adam(0.01, name="biases")
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(ema(), {".*bias": biases}))


def test_the_averages_are_validated():
    for optimizer in (ema(), keras.optimizers.LossScaleOptimizer(ema()), several()):
        model = make(optimizer=optimizer, run_eagerly=False)
        history = fit(model, callbacks.SwapEMAWeights(), epochs=2)
        results = model.evaluate(X[:5], Y[:5], verbose=0, return_dict=True)
        # Keras ends a training by putting the averages into the model.
        assert history.history["val_loss"][-1] == results["loss"]


def test_training_goes_on_with_the_same_bits():
    for optimizer in (ema, several):
        results = []
        for own in ([], [callbacks.SwapEMAWeights()], [callbacks.SwapEMAWeights(True)]):
            model = make(optimizer=optimizer())
            fit(model, *own, epochs=3)
            results.append(model.get_weights())
        same(results[0], results[1])
        same(results[0], results[2])


def test_on_epoch_others_see_the_averages():
    model, keep, plain = make(optimizer=ema()), Keep(), Keep()
    fit(model, callbacks.SwapEMAWeights(swap_on_epoch=True), keep, epochs=3)
    fit(make(optimizer=ema()), plain, epochs=3)
    for epoch in range(3):
        same(keep.kept["end"][epoch], plain.kept["averages"][epoch])
        same(keep.kept["begin"][epoch], plain.kept["begin"][epoch])
    same(model.get_weights(), keep.kept["end"][-1])


def test_what_is_saved_is_the_average(tmp_path):
    model = make(optimizer=ema())
    swap = callbacks.SwapEMAWeights(swap_on_epoch=True)
    fit(model, swap, callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras")), epochs=2)
    same(keras.models.load_model(tmp_path / "2.keras").get_weights(), model.get_weights())


def test_whoever_ends_training_the_averages_stay():
    model, keep = make(optimizer=ema()), Keep()
    fit(model, callbacks.SwapEMAWeights(swap_on_epoch=True), keep, StopAfter(1), epochs=5)
    same(model.get_weights(), keep.kept["end"][1])
    assert "finalize_variable_values" not in vars(model.optimizer)


def test_after_predict_the_weights_are_back():
    model = make(optimizer=ema())
    fit(model, epochs=2)
    model.layers[0].kernel.assign_add(np.ones((3, 1)))
    before = model.get_weights()
    model.predict(X, verbose=0, callbacks=[callbacks.SwapEMAWeights()])
    same(model.get_weights(), before)


def test_without_averages():
    with pytest.raises(ValueError, match="must be used when `use_ema=True` is set"):
        fit(make(), callbacks.SwapEMAWeights())
    with pytest.raises(ValueError, match="at least one inner optimizer has `use_ema=True`"):
        fit(make(optimizer=two_optimizers()), callbacks.SwapEMAWeights())


@pytest.mark.parametrize("after", [4, 6])
def test_a_run_that_is_continued(tmp_path, after):
    def run(*others):
        model = make(optimizer=ema())
        fit(model, callbacks.SwapEMAWeights(swap_on_epoch=True), *others, epochs=4)
        return model.get_weights()

    saver = callbacks.StoreCheckpoint(str(tmp_path), resume=True)
    with pytest.raises(InterruptedError):
        run(saver, Interrupt(after))
    end(saver)
    same(run(callbacks.StoreCheckpoint(str(tmp_path), resume=True)), run())


def test_two_ranks_validate_the_same_averages():
    def rank(runtime):
        optimizer = keras.optimizers.SGD(0.02, use_ema=True, ema_momentum=0.9)
        keep = Keep()
        own = [callbacks.SwapEMAWeights(), callbacks.ConsistencyGuard(), keep]
        history = ranks.fit(runtime, own, epochs=3, optimizer=optimizer)
        return history.history["val_loss"], keep.kept["test"]

    (first, weights), (second, others) = ranks.run(rank)
    assert first == second
    for a, b in zip(weights, others, strict=True):
        same(a, b)
