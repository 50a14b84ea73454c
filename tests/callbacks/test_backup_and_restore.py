"""An interrupted `fit` goes on where it was: in one process, whatever was saved."""

from __future__ import annotations

import contextlib
import os
import signal

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError
from orchestrator.preemption import Preempted
from tests.callbacks.models import X, Y, fit, make


class Interrupt(keras.callbacks.Callback):
    """Raises after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if self._left == 0:
            raise InterruptedError("by the test")


class Counting(keras.callbacks.Callback):
    """A user's own, with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)

    def get_state(self):
        return {"batches": self.batches, "array": np.array(self.batches, np.int16)}

    def set_state(self, state):
        assert state["array"].tolist() == state["batches"]
        self.batches = list(state["batches"])


def end(saver):
    """As the end of its process would."""
    saver.close()
    saver._writer.close()


def interrupted(run, folder, after):
    saver = callbacks.BackupAndRestore(str(folder), 1)
    with pytest.raises(InterruptedError):
        run(saver, Interrupt(after))
    end(saver)


def others(folder):
    return [
        Counting(),
        callbacks.EarlyStopping(patience=2, restore_best_weights=True),
        callbacks.ReduceLROnPlateau(patience=1),
        callbacks.CSVLogger(str(folder / "history.csv")),
    ]


def outcome(model, history, folder, counting):
    variables = [*model.weights, *model.optimizer.variables]
    return (
        [v.numpy().tolist() for v in variables],
        (history.epoch, history.history),
        (folder / "history.csv").read_text(),
        counting.batches,
    )


@pytest.mark.parametrize("freq", ["epoch", 1, 2])
@pytest.mark.parametrize("after", [1, 4, 6, 11])
def test_a_second_fit_goes_on(tmp_path, freq, after):
    """Also in the middle of an epoch: 3 batches each. Keras would begin that one again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    model, extra = make(), others(whole)
    expected = outcome(model, fit(model, *extra, epochs=5, shuffle=False), whole, extra[0])

    backup = str(parts / "backup")
    saver = callbacks.BackupAndRestore(backup, freq)
    with pytest.raises(InterruptedError):
        fit(make(), Interrupt(after), *others(parts), saver, epochs=5, shuffle=False)
    end(saver)
    model, extra = make(), others(parts)
    saver = callbacks.BackupAndRestore(backup, freq)
    history = fit(model, *extra, saver, epochs=5, shuffle=False)
    assert outcome(model, history, parts, extra[0]) == expected
    assert not os.path.exists(backup)


@pytest.mark.parametrize("freq", ["epoch", 1])
def test_the_same_callback_and_model_again(tmp_path, freq):
    """As in a notebook. What each batch counts, in a weight that is not trained, is not lost."""
    model = keras.Sequential([keras.Input((3,)), Seen(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    saver = callbacks.BackupAndRestore(str(tmp_path / "backup"), freq)
    with pytest.raises(InterruptedError):
        fit(model, saver, Interrupt(5), epochs=6)
    history = fit(model, saver, epochs=4)
    assert history.epoch == [0, 1, 2, 3]
    assert float(model.layers[0].batches.numpy()) == int(model.optimizer.iterations.numpy()) == 12
    assert not (tmp_path / "backup").exists()


class Seen(keras.layers.Layer):
    """Counts training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = self.add_weight((), "zeros", trainable=False)

    def call(self, x, training=False):
        if training:
            self.batches.assign_add(1)
        return x


def test_what_is_not_its_own_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fit(make(), callbacks.BackupAndRestore(str(tmp_path)))
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(("raise_error", "left"), [(True, [2]), (False, [])])
def test_a_nan_that_is_raised_leaves_the_backup(tmp_path, raise_error, left):
    y = Y.copy()
    y[9] = np.nan  # in the third batch
    saver = callbacks.BackupAndRestore(str(tmp_path), 1)
    own = [saver, callbacks.TerminateOnNaN(raise_error)]
    raised = pytest.raises(RuntimeError) if raise_error else contextlib.nullcontext()
    with raised:
        make().fit(X, y, batch_size=4, shuffle=False, verbose=0, callbacks=own)
    if raise_error:
        end(saver)
    assert [one.step for one in CheckpointStore(str(tmp_path)).list()] == left


@pytest.mark.parametrize(("double", "kept"), [(False, [12]), (True, [9, 12])])
def test_what_is_left(tmp_path, double, kept):
    saver = callbacks.BackupAndRestore(
        str(tmp_path), double_checkpoint=double, delete_checkpoint=False
    )
    fit(make(), saver, epochs=4)
    assert [one.step for one in CheckpointStore(str(tmp_path)).list()] == kept


def test_the_one_before_where_the_last_is_broken(tmp_path, caplog):
    saver = callbacks.BackupAndRestore(
        str(tmp_path), double_checkpoint=True, delete_checkpoint=False
    )
    fit(make(), saver, epochs=4)
    (broken,) = tmp_path.glob("step-*12/*/model.weights.h5")
    broken.write_bytes(b"torn")
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append(epoch))
    fit(make(), watch, callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False), epochs=5)
    assert seen == [3, 4]
    assert "step 12 is passed over" in caplog.text


def test_another_model_is_refused_and_nothing_lost(tmp_path):
    fit(make(), callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False), epochs=2)
    wider = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    wider.compile("adam", "mse", run_eagerly=True)
    with pytest.raises(SettingError, match=r"another model.*\[3, 1\].*\[3, 2\]"):
        fit(wider, callbacks.BackupAndRestore(str(tmp_path)))
    with pytest.raises(SettingError, match="another model or optimizer"):
        fit(make(optimizer=keras.optimizers.SGD()), callbacks.BackupAndRestore(str(tmp_path)))
    assert [one.step for one in CheckpointStore(str(tmp_path)).list()] == [6]


@pytest.mark.parametrize("name", ["subclassed", "unbuilt"])
def test_a_model_that_is_built_by_its_data(tmp_path, name):
    def unbuilt():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(1)])
        model.compile("adam", "mse", metrics=["mae"])
        return model

    def run(*extra, epochs=3):
        model = unbuilt()
        history = fit(model, *extra, epochs=epochs, shuffle=False)
        return model, history

    expected, whole = run()
    interrupted(run, tmp_path, 5)
    model, history = run(callbacks.BackupAndRestore(str(tmp_path), 1))
    assert history.history == whole.history
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("steps", [2, 3])
def test_with_steps_per_epoch_one_pass_goes_through_all_epochs(tmp_path, steps):
    def batches():
        rng = np.random.default_rng(0)
        while True:
            yield rng.normal(size=(4, 3)).astype("float32"), np.zeros((4, 1), "float32")

    def run(*extra):
        model = make(run_eagerly=False)
        history = model.fit(
            batches(), epochs=4, steps_per_epoch=steps, verbose=0, callbacks=[*extra], shuffle=False
        )
        return model.get_weights(), history.history

    expected = run()
    interrupted(run, tmp_path, 5)
    weights, history = run(callbacks.BackupAndRestore(str(tmp_path), 1))
    assert history == expected[1]
    for ours, theirs in zip(weights, expected[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_only_at_a_preemption(tmp_path):
    saver = callbacks.BackupAndRestore(str(tmp_path), save_freq=False, delete_checkpoint=False)
    fit(make(), saver, epochs=2)
    assert CheckpointStore(str(tmp_path)).list() == []


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # so Keras finds the end
def test_the_last_batch_of_an_epoch_of_unknown_length(tmp_path):
    import tensorflow as tf

    def run(*extra):
        model = make(run_eagerly=False)
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
        data = data.filter(lambda *batch: tf.reduce_sum(batch[0]) < 1e9)  # hides the number
        return model.fit(data, epochs=3, verbose=0, callbacks=[*extra], shuffle=False).history

    expected = run()
    interrupted(run, tmp_path, 4)
    assert run(callbacks.BackupAndRestore(str(tmp_path), 1)) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_training_which_goes_on_from_there(tmp_path, number):
    watches = []

    def told(batch, logs):
        if batch == 1:
            watches.append(saver._watch)
            os.kill(os.getpid(), number)

    own = keras.callbacks.LambdaCallback(on_train_batch_end=told)
    saver = callbacks.BackupAndRestore(str(tmp_path), save_freq=False)
    with pytest.raises(Preempted, match=number.name) as caught:
        fit(make(), own, saver, epochs=9)
    assert caught.value.code == 75
    watches[0].__exit__(None, None, None)  # which ends the process after the grace
    history = fit(make(), callbacks.BackupAndRestore(str(tmp_path)), epochs=2)
    assert history.epoch == [0, 1]


def test_what_keras_s_own_left_is_left_alone(tmp_path):
    with pytest.raises(InterruptedError):
        fit(make(), keras.callbacks.BackupAndRestore(str(tmp_path)), Interrupt(7), epochs=4)
    before = sorted(os.listdir(tmp_path))
    assert "latest.weights.h5" in before
    history = fit(make(), callbacks.BackupAndRestore(str(tmp_path)), epochs=4)
    assert history.epoch == [0, 1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == before
