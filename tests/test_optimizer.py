"""Optimizers that reduce: weighted by samples, the same class, the same files."""

from __future__ import annotations

import json
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import gradients
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.gradients import cut, samples
from orchestrator.optimizer import distribute, is_distributed, settle
from tests.fakes import FakeCommunicator, others_add


def variables(*shapes) -> list[keras.Variable]:
    return [keras.Variable(np.zeros(shape, "float32")) for shape in shapes]


OPTIMIZERS = [
    keras.optimizers.SGD(0.1, momentum=0.9),
    keras.optimizers.Adam(1e-2, clipnorm=1.0),
    keras.optimizers.AdamW(1e-2, weight_decay=0.01),
    keras.optimizers.RMSprop(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)),
    keras.optimizers.Lion(1e-3, use_ema=True),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_it_is_the_same_object_class_and_config(optimizer):
    kind, config = type(optimizer), optimizer.get_config()
    assert distribute(optimizer, FakeCommunicator()) is optimizer
    assert is_distributed(optimizer)
    assert type(optimizer) is kind
    assert optimizer.get_config() == config
    copy = kind.from_config(optimizer.get_config())
    assert not is_distributed(copy)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is kind


def test_twice_is_once():
    optimizer = keras.optimizers.SGD()
    communicator = FakeCommunicator()
    distribute(optimizer, communicator, 2)
    apply = optimizer.apply
    distribute(optimizer, communicator, 2)
    assert optimizer.apply is apply
    (w,) = variables((2,))
    with samples(4):
        optimizer.apply([tf.ones(2)], [w])
    assert communicator.buckets == [2], "one reduction: the gradient and the count"


def test_one_rank_is_left_alone():
    optimizer = keras.optimizers.SGD()
    distribute(optimizer, SingleCommunicator())
    assert not is_distributed(optimizer)
    assert "apply" not in vars(optimizer)


@pytest.mark.parametrize("wrong", ["adam", None, keras.optimizers.SGD, object()])
def test_no_optimizer(wrong):
    with pytest.raises(TypeError, match="takes a Keras 3 optimizer"):
        distribute(wrong, FakeCommunicator())


def test_bad_buckets():
    with pytest.raises(ValueError, match="got 0"):
        distribute(keras.optimizers.SGD(), FakeCommunicator(), 0)


def build(optimizer) -> keras.Model:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def test_files_are_those_of_a_plain_model(tmp_path):
    contents = []
    for name in ("plain", "ours"):
        optimizer = keras.optimizers.Adam(1e-2, name="adam")
        if name == "ours":
            distribute(optimizer, FakeCommunicator())
        model = build(optimizer)
        with samples(8):
            model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0, epochs=2)
        model.save(tmp_path / f"{name}.keras")
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as file:
            assert sorted(file.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
            config = json.loads(file.read("config.json"))
        contents.append((config["compile_config"], config["config"]["layers"][1]["class_name"]))
        loaded = keras.models.load_model(tmp_path / f"{name}.keras")
        assert type(loaded.optimizer) is keras.optimizers.Adam
        assert not is_distributed(loaded.optimizer)
        assert int(loaded.optimizer.iterations.numpy()) == 2
        contents[-1] += (tuple(v.numpy().tobytes() for v in loaded.optimizer.variables),)
    assert contents[0] == contents[1]


def test_weighted_by_samples_on_two_ranks():
    """3 samples here with gradient 1, 1 there with gradient 5: the global mean is 2."""
    optimizer = keras.optimizers.SGD(1.0)
    other = others_add(1, np.full((2, 2), 5.0, np.float32))
    distribute(optimizer, FakeCommunicator(gradients=other))
    (w,) = variables((2, 2))
    with samples(3):
        optimizer.apply([tf.ones((2, 2))], [w])
    np.testing.assert_allclose(w.numpy(), -2.0 * np.ones((2, 2)), rtol=1e-6)


@pytest.mark.parametrize("gradient", [0.0, 9.0, float("nan"), float("inf")])
def test_a_rank_without_samples_counts_for_nothing(gradient):
    other = others_add(3, [6.0, 9.0])
    optimizer = keras.optimizers.SGD(1.0)
    distribute(optimizer, FakeCommunicator(gradients=other))
    (w,) = variables((2,))
    with samples(0):
        optimizer.apply([tf.fill([2], gradient)], [w])
    np.testing.assert_allclose(w.numpy(), [-2.0, -3.0])


def test_gradients_keep_their_places():
    a, b, c = variables((2,), (3,), (1,))
    optimizer = keras.optimizers.SGD(1.0)
    communicator = FakeCommunicator()
    distribute(optimizer, communicator, 3)
    with samples(2):
        optimizer.apply([tf.ones(2) * 1, tf.ones(3) * 2, tf.ones(1) * 3], [a, b, c])
    for variable, value in ((a, 1), (b, 2), (c, 3)):
        np.testing.assert_allclose(variable.numpy(), -value * np.ones(variable.shape))
    assert len(communicator.buckets) > 1


def test_the_last_layers_gradients_go_first():
    sent = []

    def other(bucket):
        sent.append([float(t[0]) for t in bucket[:-1]])
        return bucket

    optimizer = keras.optimizers.SGD(1.0)
    distribute(optimizer, FakeCommunicator(gradients=other), 2)
    with samples(1):
        optimizer.apply([tf.fill([4], float(i)) for i in range(4)], variables(*[(4,)] * 4))
    assert sent == [[3.0, 2.0], [1.0, 0.0]]


def test_none_gradients_stay_none():
    a, b = variables((2,), (2,))
    optimizer = keras.optimizers.SGD(1.0)
    communicator = FakeCommunicator()
    distribute(optimizer, communicator)
    with samples(1), pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, tf.ones(2)], [a, b])
    np.testing.assert_array_equal(a.numpy(), [0, 0])
    np.testing.assert_array_equal(b.numpy(), [-1, -1])
    assert communicator.buckets == [2]


def test_sparse_gradients_become_dense():
    (table,) = variables((4, 2))
    optimizer = keras.optimizers.SGD(1.0)
    distribute(optimizer, FakeCommunicator())
    slices = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]), tf.constant([4, 2]))
    with samples(1):
        optimizer.apply([slices], [table])
    np.testing.assert_array_equal(table.numpy(), [[0, 0], [-2, -2], [0, 0], [0, 0]])


def test_half_precision_travels_as_float32():
    """Counts times gradients would leave its range."""
    kinds = []

    def other(bucket):
        kinds.append([t.dtype.name for t in bucket])
        return bucket

    optimizer = keras.optimizers.SGD(1.0)
    distribute(optimizer, FakeCommunicator(gradients=other))
    w = keras.Variable(np.zeros(2, "float16"), dtype="float16")
    with samples(70_000):
        optimizer.apply([tf.ones(2, tf.float16)], [w])
    assert kinds == [["float32", "float32"]]
    np.testing.assert_allclose(w.numpy(), [-1, -1])


def test_clipping_is_of_the_global_gradient():
    """Keras clips in `apply`, after the reduction: a clipped mean, not a mean of clipped."""
    other = others_add(1, [-9.0])
    optimizer = keras.optimizers.SGD(1.0, clipvalue=1.0)
    distribute(optimizer, FakeCommunicator(gradients=other))
    (w,) = variables((1,))
    with samples(1):
        optimizer.apply([tf.constant([10.0])], [w])
    np.testing.assert_allclose(w.numpy(), [-0.5])


def test_without_a_sample_count():
    optimizer = keras.optimizers.SGD()
    distribute(optimizer, FakeCommunicator())
    (w,) = variables((2,))
    with pytest.raises(RuntimeError, match=r"runtime\.broadcast\(model\).*runtime\.samples"):
        optimizer.apply([tf.ones(2)], [w])
    np.testing.assert_array_equal(w.numpy(), [0, 0])


def test_sample_counts_nest_and_end():
    with samples(3):
        with samples(5):
            assert gradients.behind().count == 5
        assert gradients.behind().count == 3
    with pytest.raises(RuntimeError):
        gradients.behind()
    with pytest.raises(ZeroDivisionError), samples(2):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        gradients.behind()


shapes = st.lists(st.integers(0, 3), max_size=3)


@given(sizes=st.lists(shapes, max_size=12), buckets=st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_cut_keeps_order_and_leaves_none_empty(sizes, buckets):
    tensors = [tf.zeros(shape) for shape in sizes]
    result = cut(tensors, buckets)
    assert [id(t) for bucket in result for t in bucket] == [id(t) for t in tensors]
    assert len(result) <= buckets
    assert all(result)


def test_cut_is_about_even_in_bytes():
    tensors = [tf.zeros(10) for _ in range(8)]
    assert [len(b) for b in cut(tensors, 4)] == [2, 2, 2, 2]
    assert [len(b) for b in cut(tensors, 1)] == [8]
    big = [tf.zeros(100), tf.zeros(1), tf.zeros(1), tf.zeros(98)]
    assert [len(b) for b in cut(big, 2)] == [1, 3]
    assert [len(b) for b in cut([tf.zeros(4, tf.float64), tf.zeros(8)], 2)] == [1, 1]


def test_loss_scaling_moves_outside():
    inner = keras.optimizers.SGD(1.0)
    communicator = FakeCommunicator()
    distribute(inner, communicator, 2)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    settle(outer)
    assert is_distributed(outer)
    assert not is_distributed(inner)
    assert outer.apply.reduction.buckets == 2
    settle(outer)  # once
    assert is_distributed(outer)


@pytest.mark.parametrize("there", [float("inf"), float("nan")])
def test_a_non_finite_gradient_anywhere_skips_the_step_here(there):
    other = others_add(1, [there, there])
    inner = keras.optimizers.SGD(1.0)
    communicator = FakeCommunicator(gradients=other)
    distribute(inner, communicator)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    settle(outer)
    (w,) = variables((2,))
    outer.build([w])
    with samples(1):
        outer.apply([tf.ones(2)], [w])
    np.testing.assert_array_equal(w.numpy(), [0, 0])
    assert float(outer.dynamic_scale.numpy()) == 2.0


def test_settle_leaves_others_alone():
    plain = keras.optimizers.SGD()
    settle(plain)
    assert not is_distributed(plain)
    ours = keras.optimizers.SGD()
    distribute(ours, FakeCommunicator())
    settle(ours)
    assert is_distributed(ours)
    wrapped = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    settle(wrapped)
    assert not is_distributed(wrapped)
