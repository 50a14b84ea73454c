"""The guard names what differs first and where, and costs one collective."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import callbacks, weights
from orchestrator.config import SettingError
from orchestrator.runtime import Runtime
from orchestrator.steps import DivergedError
from tests.callbacks import ranks
from tests.callbacks.models import fit, make
from tests.callbacks.test_learning_rate_scheduler import two_optimizers
from tests.fakes import FakeCommunicator, Recorder


@given(
    array=st.sampled_from(["float32", "float64", "float16", "int32", "int8"]).flatmap(
        lambda kind: st.lists(st.integers(-100, 100), min_size=1, max_size=9).map(
            lambda values: np.array(values, kind)
        )
    ),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_any_flipped_bit_changes_the_fingerprint(array, data):
    changed = array.copy()
    byte = data.draw(st.integers(0, array.nbytes - 1))
    changed.view(np.uint8)[byte] ^= 1 << data.draw(st.integers(0, 7))
    one, two = weights.fingerprints([tf.constant(array)]), weights.fingerprints([changed])
    assert one.dtype == np.int64
    assert one[0] != two[0]


def test_exchanged_elements_change_the_fingerprint():
    one, two = weights.fingerprints([tf.constant([1.0, 2.0]), tf.constant([2.0, 1.0])])
    assert one != two


@pytest.mark.parametrize("wrong", [0, -1, "batch", 1.5, None])
def test_bad_frequencies(wrong):
    with pytest.raises(SettingError, match="check_freq"):
        callbacks.ConsistencyGuard(wrong)


def others(change):
    """Rows of two more ranks: this one's, and with `change(row)` one that differs."""

    def reduce(table):
        assert table.dtype == np.int64
        whole = np.repeat(table[:1], 3, 0)
        change(whole)
        return whole

    return reduce


def run(change, recorder, check_freq="epoch", epochs=1):
    communicator = FakeCommunicator(size=3, reduce=others(change))
    runtime = Runtime(communicator)
    runtime.events = recorder
    model = make()
    with runtime.use():
        runtime.distribute(model.optimizer)
        runtime.broadcast(model)
        communicator.calls.clear()
        fit(model, callbacks.ConsistencyGuard(check_freq), epochs=epochs, validation_data=None)
    return communicator


def flip(rank, column):
    def change(table):
        table[rank, column] ^= 1

    return change


@pytest.mark.parametrize(
    ("rank", "column", "name"),
    [(1, 0, "kernel"), (2, 1, "bias"), (1, -2, "learning rate"), (0, -1, "step")],
)
def test_what_differs_is_named(rank, column, name):
    with pytest.raises(DivergedError, match=rf"{name}' on rank\(s\) {rank} "):
        run(flip(rank, column), Recorder())


def test_the_first_of_several_is_named_with_all_its_ranks():
    def change(table):
        table[0, 1:] += 7
        table[2, 2:] += 9

    with pytest.raises(DivergedError, match=r"bias' on rank\(s\) 0 "):
        run(change, Recorder())


def test_a_difference_is_an_event():
    recorder = Recorder()
    with pytest.raises(DivergedError):
        run(flip(2, 0), recorder)
    (event,) = [e for e in recorder.events if e["kind"] == "fault"]
    assert (event["rank"], event["epoch"], event["step"]) == (2, 0, 3)
    assert event["variable"].endswith("kernel")


@pytest.mark.parametrize(("check_freq", "checks"), [("epoch", 4), (1, 12), (2, 6), (5, 2)])
def test_one_allreduce_a_check(check_freq, checks):
    recorder = Recorder()
    communicator = run(lambda table: None, recorder, check_freq, epochs=4)  # 3 batches each
    assert communicator.calls.count("allreduce") == checks
    assert recorder.kinds() == []


def test_one_rank_has_nothing_to_compare():
    model = make()
    guard = callbacks.ConsistencyGuard(1)
    fit(model, guard)
    guard.check()


class Flip(keras.callbacks.Callback):
    """Flips the lowest bit of one variable as an epoch ends."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_epoch_end(self, epoch, logs=None):
        held = [*self.model.weights, *self.model.optimizer.variables]
        (one,) = [variable for variable in held if variable.path.endswith(self._name)]
        changed = np.array(one.numpy())
        changed.reshape(-1).view(np.uint8)[0] ^= 1
        one.assign(changed)


def test_two_optimizers_that_are_alike():
    def rank(runtime):
        guard = callbacks.ConsistencyGuard(2)
        return ranks.fit(runtime, [guard], optimizer=two_optimizers()).epoch

    assert ranks.run(rank) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    "name", ["dense/kernel", "dense_bias_momentum", "biases/learning_rate", "all/iteration"]
)
def test_a_flipped_bit_beside_two_optimizers(name):
    """On rank 1, after the four steps of the first epoch."""

    def rank(runtime):
        own = [Flip(name)] if runtime.rank else []
        with pytest.raises(DivergedError, match=rf"{name}' on rank\(s\) 1 .* at step 4\."):
            ranks.fit(runtime, [*own, callbacks.ConsistencyGuard()], optimizer=two_optimizers())

    ranks.run(rank)
