"""Initial state, the first-step self-test, and weights equal to the single process's."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator import callbacks, weights
from orchestrator.runtime import Runtime
from orchestrator.steps import DivergedError
from tests.distributed import problems
from tests.distributed.rank_plugin import SIZE, three


def unlike(rank):
    """A model whose weights, optimizer state and seeds differ by rank."""
    keras.utils.set_random_seed(rank)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=11),
            keras.layers.GaussianNoise(0.1, seed=12),
            keras.layers.Dense(10),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01 * (rank + 1)), "mse")
    model.optimizer.build(model.trainable_variables)
    for variable in [*model.optimizer.variables, *model.non_trainable_weights]:
        variable.assign(variable + rank)
    return model


def state_bits(model):
    return problems.bits([v.numpy() for v in weights.state_variables(model)])


def seed_states(model):
    return [v.numpy().tolist() for v in weights.seed_variables(model)]


def test_broadcast_gives_rank_0s_state(runtime, communicator):
    model = unlike(runtime.rank)
    before = communicator.allgather_object(state_bits(model))
    for a in range(runtime.size):
        assert all(before[a] != before[b] for b in range(a))
    weights.broadcast_model(communicator, model)
    after = communicator.allgather_object(state_bits(model))
    assert all(state == before[0] for state in after)


def test_broadcast_sets_seeds_apart_reproducibly(runtime, communicator):
    states = []
    for _ in range(2):
        model = unlike(0)
        fresh = seed_states(model)
        assert len(fresh) == 2
        weights.broadcast_model(communicator, model)
        states.append(communicator.allgather_object(seed_states(model)))
        assert states[-1][0] == fresh
    assert states[0] == states[1]
    for generator in range(2):
        assert len({tuple(rank[generator]) for rank in states[0]}) == runtime.size


@three
def test_broadcast_waits_until_a_model_is_built(runtime, communicator):
    keras.utils.set_random_seed(runtime.rank)
    model = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
    model.compile(runtime.distribute(keras.optimizers.Adam()), "sparse_categorical_crossentropy")
    runtime.broadcast(model)
    model.fit(runtime.shard(problems.digits(64), batch_size=32), verbose=0)
    ends = communicator.allgather_object(weights.weights_digest(model))
    assert len(set(ends)) == 1


def fit(runtime, optimizer, *, seed, broadcast, ours=True):
    model = problems.mlp(8, seed=seed)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    if broadcast:
        runtime.broadcast(model)
    part = runtime.shard(problems.digits(128), batch_size=64)
    return model.fit(
        part, epochs=2, verbose=0, callbacks=[callbacks.EarlyStopping("loss")] if ours else []
    )


def message_everywhere(communicator, kind, function):
    """Every rank raises `kind` with one and the same message, which is returned."""
    with pytest.raises(kind) as caught:
        function()
    messages = communicator.allgather_object(str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


@three
@pytest.mark.parametrize("broadcast", [True, False])
def test_an_optimizer_not_distributed_is_found(runtime, communicator, broadcast):
    sgd = keras.optimizers.SGD(0.1)
    message = message_everywhere(
        communicator, DivergedError, lambda: fit(runtime, sgd, seed=1, broadcast=broadcast)
    )
    assert "the optimizer is not distributed" in message
    assert "runtime.distribute(optimizer)" in message


@three
def test_unlike_initial_weights_are_found(runtime, communicator):
    sgd = runtime.distribute(keras.optimizers.SGD(0.1))
    message = message_everywhere(
        communicator,
        DivergedError,
        lambda: fit(runtime, sgd, seed=1 + runtime.rank, broadcast=False),
    )
    assert "no broadcast" in message
    assert "runtime.broadcast(model)" in message


@three
def test_distribute_alone_says_what_is_missing(runtime, communicator):
    sgd = runtime.distribute(keras.optimizers.SGD(0.1))
    message = message_everywhere(
        communicator,
        RuntimeError,
        lambda: fit(runtime, sgd, seed=1, broadcast=False, ours=False),
    )
    assert "runtime.broadcast(model)" in message


@three
def test_alike_ranks_pass_the_self_test(runtime):
    fit(runtime, runtime.distribute(keras.optimizers.SGD(0.1)), seed=1, broadcast=True)


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-3),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=4),
}


def trained(runtime, optimizer, arrays, distribute=True):
    model = problems.mlp(32, 32, 32, seed=3)  # enough weights for three buckets
    optimizer = runtime.distribute(optimizer) if distribute else optimizer
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
    if distribute:
        runtime.broadcast(model)
    model.fit(runtime.shard(arrays, batch_size=64), epochs=3, verbose=0)
    # What a rank has accumulated since the last update is its own.
    accumulated = {id(v) for v in getattr(model.optimizer, "_accumulated_gradients", [])}
    shared = [v for v in model.optimizer.variables if id(v) not in accumulated]
    return [v.numpy() for v in [*model.variables, *shared]]


# 293 = 4 x 64 + 37: uneven parts; 257 = 4 x 64 + 1: all ranks but one are empty in the last step.
CASES = [
    ("adam", 1, 293),
    ("adam", 3, 257),
    ("momentum", 3, 293),
    ("momentum", 1, 257),
    ("clipnorm", 1, 293),
    ("clipnorm", 3, 257),
    ("accumulation", 1, 293),
    ("accumulation", 3, 257),
]
# All at 3 ranks, where every part is uneven; elsewhere one with small and one with empty parts.
CASES = CASES if SIZE == 3 else [CASES[0], CASES[-1]]


@pytest.mark.parametrize(("name", "buckets", "count"), CASES)
def test_weights_equal_the_single_process(runtime, communicator, note, name, buckets, count):
    arrays = problems.digits(count)
    counted = Runtime(communicator, gradient_buckets=buckets)
    with counted.use():
        ours = trained(counted, OPTIMIZERS[name](), arrays)
    assert len(set(communicator.allgather_object(tuple(problems.bits(ours))))) == 1
    theirs = trained(problems.alone(), OPTIMIZERS[name](), arrays, False) if runtime.is_root else 0
    theirs = communicator.broadcast_object(theirs)
    assert all(np.isfinite(array).all() for array in ours)
    difference = problems.worst(ours, theirs)
    note(f"weights {name}, {count} samples, {buckets} bucket(s)", difference)
    assert difference <= (0 if runtime.size == 1 else 1e-6)


@three
def test_a_model_in_double_precision_is_exact(runtime, note):
    # Its gradients and the sample count have two dtypes in one bucket.
    def train(runtime):
        keras.utils.set_random_seed(5)
        layer = keras.layers.Dense(10, "softmax", dtype="float64")
        model = keras.Sequential([keras.Input((64,), dtype="float64"), layer])
        model.compile(
            runtime.distribute(keras.optimizers.SGD(0.1)), "sparse_categorical_crossentropy"
        )
        runtime.broadcast(model)
        model.fit(runtime.shard(problems.digits(101), batch_size=64), epochs=2, verbose=0)
        return model.get_weights()

    difference = problems.worst(train(runtime), train(problems.alone()))
    note("weights in float64", difference)
    assert difference <= 1e-6


@three
def test_sample_weights_and_regularizers_are_exact(runtime, communicator, note):
    x, y = problems.digits(293)
    importance = np.linspace(0, 2, len(x), dtype="float32")

    def train(runtime):
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(
                    10,
                    "softmax",
                    kernel_initializer="zeros",
                    kernel_regularizer=keras.regularizers.L2(0.1),
                ),
            ]
        )
        model.compile(
            runtime.distribute(keras.optimizers.SGD(0.1)), "sparse_categorical_crossentropy"
        )
        runtime.broadcast(model)
        model.fit(runtime.shard((x, y, importance), batch_size=64), epochs=2, verbose=0)
        return model.get_weights()

    difference = problems.worst(train(runtime), train(problems.alone()))
    note("weights with sample weights and L2", difference)
    assert difference <= 1e-6
