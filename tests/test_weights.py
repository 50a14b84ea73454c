"""State across ranks: what is broadcast, in how many messages, and how it is compared."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from orchestrator import weights
from orchestrator.communicators.single import SingleCommunicator
from tests.fakes import FakeCommunicator

arrays = st.lists(
    hnp.arrays(
        st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    max_size=6,
)


def make(seed: int = 0, dropout: bool = False) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    model = keras.Sequential(
        [*layers, *([keras.layers.Dropout(0.5)] if dropout else []), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    return model


@given(sent=arrays)
@settings(deadline=None)
def test_any_arrays_arrive_as_they_are(sent):
    received = weights.broadcast_arrays(SingleCommunicator(), sent)
    assert len(received) == len(sent)
    for there, here in zip(sent, received, strict=True):
        assert (here.dtype, here.shape) == (there.dtype, there.shape)
        assert here.tobytes() == there.tobytes()
        assert here is not there


def test_the_roots_values_on_another_rank():
    root = [np.arange(6, dtype="float32").reshape(2, 3), np.array(7, "int64")]
    flat = np.concatenate([a.reshape(-1).view(np.uint8) for a in root])
    communicator = FakeCommunicator(1, 2, broadcast=lambda _: flat)
    received = weights.broadcast_arrays(communicator, [np.zeros((2, 3), "float32"), np.array(0)])
    np.testing.assert_array_equal(received[0], root[0])
    assert received[1] == 7


@pytest.mark.parametrize(
    ("sizes", "messages"),
    [([], 0), ([10], 1), ([10] * 100, 1), ([50, 51], 2), ([500], 1), ([90, 10, 1, 99], 2)],
)
def test_few_messages(monkeypatch, sizes, messages):
    monkeypatch.setattr(weights, "MESSAGE_BYTES", 100)
    if len(sizes) == 100:
        monkeypatch.setattr(weights, "MESSAGE_BYTES", 1000)
    communicator = FakeCommunicator()
    sent = [np.zeros(size, np.uint8) for size in sizes]
    received = weights.broadcast_arrays(communicator, sent)
    assert [a.size for a in received] == sizes
    assert communicator.calls == ["broadcast"] * messages


def test_what_must_be_alike():
    model = make(dropout=True)
    names = [v.path for v in weights.state_variables(model)]
    assert len(names) == len(set(names))
    assert {"moving_mean", "moving_variance", "kernel", "bias"} <= {n.split("/")[-1] for n in names}
    assert model.optimizer.built
    assert {v.path for v in model.optimizer.variables} <= set(names)
    assert not any("mae" in name or "seed" in name for name in names)
    seeds = weights.seed_variables(model)
    assert [v.path.split("/")[-1] for v in seeds] == ["seed_generator_state"]
    assert weights.seed_variables(make()) == []


def test_uncompiled_models_have_weights_alone():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert [v.path for v in weights.state_variables(model)] == [v.path for v in model.weights]


def test_broadcast_model_takes_the_roots_weights_and_optimizer():
    root, other = make(1, dropout=True), make(2, dropout=True)
    x, y = np.ones((4, 3)), np.ones((4, 1))
    root.fit(x, y, verbose=0, epochs=2)
    sent: list[np.ndarray] = []

    class Root(FakeCommunicator):
        def broadcast(self, array, root=0):
            sent.append(np.array(array))
            return super().broadcast(array, root)

    weights.broadcast_model(Root(), root)
    queue = iter(sent)
    weights.broadcast_model(FakeCommunicator(1, 2, broadcast=lambda _: next(queue)), other)
    for mine, theirs in zip(
        weights.state_variables(root), weights.state_variables(other), strict=True
    ):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    assert int(other.optimizer.iterations.numpy()) == 2
    assert weights.weights_digest(root) == weights.weights_digest(other)
    # dropout differs between ranks, and does not between runs
    (one,), (two,) = weights.seed_variables(root), weights.seed_variables(other)
    assert one.numpy().tolist() != two.numpy().tolist()
    expected = (int(one.numpy()[0]) + 0x9E3779B9) % 2**31
    assert two.numpy().tolist() == [expected, int(one.numpy()[1])]


def test_seeds_of_many_ranks_differ():
    states = set()
    model = make(3, dropout=True)
    for rank in range(64):
        (seed,) = weights.seed_variables(model)
        seed.assign(np.array([12345, 6], seed.dtype))
        weights.broadcast_model(FakeCommunicator(rank, 64), model)
        states.add(tuple(seed.numpy().tolist()))
    assert len(states) == 64
    assert (12345, 6) in states


def test_digest():
    one = np.arange(6, dtype="float32")
    assert weights.digest(one) == weights.digest(one.copy())
    assert len(weights.digest(one)) == 16
    changed = one.copy()
    changed[5] = np.nextafter(changed[5], np.float32(9))
    assert weights.digest(changed) != weights.digest(one)
    assert weights.digest(np.array(-0.0)) != weights.digest(np.array(0.0))
    assert weights.digest(one[::2]) == weights.digest(np.ascontiguousarray(one[::2]))


def test_weights_digest_is_of_trainable_weights():
    model = make(1)
    before = weights.weights_digest(model)
    assert before == weights.weights_digest(make(1))
    assert before != weights.weights_digest(make(2))
    model.layers[1].moving_mean.assign(np.ones(4))
    assert weights.weights_digest(model) == before
    model.layers[0].bias.assign(np.ones(4))
    assert weights.weights_digest(model) != before
    empty = keras.Sequential([keras.Input((2,)), keras.layers.Flatten()])
    assert len(weights.weights_digest(empty)) == 16
