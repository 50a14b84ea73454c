"""Losses, optimizers and gradient options: the same weights as one process."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import orchestrator
from orchestrator import callbacks, flags
from orchestrator.optimizer import is_distributed
from orchestrator.runtime import Runtime
from orchestrator.steps import DivergedError
from tests.distributed import problems
from tests.distributed.rank_plugin import once, three


def weights_of(runtime, build, data, *, epochs=2, batch_size=16, **fit):
    """Trains what `build(runtime)` compiles; the weights and the optimizer's, in order."""
    model = build(runtime)
    runtime.broadcast(model)
    model.fit(runtime.shard(data, batch_size=batch_size), epochs=epochs, verbose=0, **fit)
    return [np.asarray(v.numpy(), "float64") for v in model.trainable_variables]


def difference(runtime, build, data, **options):
    """The worst absolute difference from one process; the ranks must have the same bytes."""
    ours = weights_of(runtime, build, data, **options)
    communicator = runtime.communicator
    assert len(set(communicator.allgather_object(tuple(problems.bits(ours))))) == 1
    assert all(np.isfinite(array).all() for array in ours)
    keras.utils.set_random_seed(7)
    alone = problems.alone()
    theirs = weights_of(alone, build, data, **options) if runtime.is_root else 0
    return problems.worst(ours, communicator.broadcast_object(theirs))


class Positions(keras.layers.Layer):
    """Adds a learned row for each place in a sequence: the same six rows for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = keras.layers.Embedding(6, 4, keras.initializers.RandomUniform(seed=4))

    def call(self, x: Any) -> Any:
        return x + self.table(keras.ops.arange(6))


def tagger(runtime, loss, *, mask=True, optimizer=None, positions=False, **compile_options):
    """Embedding, then a number for each token."""
    inputs = keras.Input((6,), dtype="int32")
    uniform = keras.initializers.RandomUniform(seed=3)
    x = keras.layers.Embedding(20, 4, uniform, mask_zero=mask)(inputs)
    if positions:
        x = Positions()(x)
    outputs = keras.layers.Dense(1, kernel_initializer=uniform)(x)
    model = keras.Model(inputs, outputs)
    model.compile(runtime.distribute(optimizer or keras.optimizers.SGD(0.5)), loss)
    return model


LOSSES = {
    "masked": ("mse", True, False),
    "masked, with sample weights": ("mse", True, True),
    "mean by sample weights": (
        keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        False,
        True,
    ),
    "masked mean by sample weights": (
        keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        True,
        True,
    ),
    "a sum": (keras.losses.MeanAbsoluteError(reduction="sum"), False, False),
    "a masked sum": (keras.losses.MeanAbsoluteError(reduction="sum"), True, True),
}


@once
@pytest.mark.parametrize("name", LOSSES)
def test_losses_divided_by_other_numbers(runtime, note, name):
    loss, mask, weighted = LOSSES[name]
    x, y = problems.tokens()
    importance = np.linspace(0, 2, x.size, dtype="float32").reshape(x.shape)
    data = (x, y, importance) if weighted else (x, y)
    rate = 0.002 if "sum" in name else 0.5

    def build(runtime):
        return tagger(runtime, loss, mask=mask, optimizer=keras.optimizers.SGD(rate))

    worst = difference(runtime, build, data)
    note(f"weights, loss {name}", worst)
    assert worst <= 1e-6


@once
@pytest.mark.parametrize("name", LOSSES)
def test_such_losses_are_reported_as_by_one_process(runtime, communicator, note, name):
    loss, mask, weighted = LOSSES[name]
    x, y = problems.tokens(49)  # the last batch has one sample
    importance = np.linspace(0, 2, x.size, dtype="float32").reshape(x.shape)
    data = (x, y, importance) if weighted else (x, y)

    def reported(runtime):
        model = tagger(runtime, loss, mask=mask, optimizer=keras.optimizers.SGD(0.0))
        runtime.broadcast(model)
        part = runtime.shard(data, batch_size=16)
        history = model.fit(
            part, validation_data=part, epochs=2, verbose=0, callbacks=[callbacks.GlobalMetrics()]
        ).history
        return [*history["loss"], *history["val_loss"], orchestrator.evaluate(model, part)["loss"]]

    ours = reported(runtime)
    alone = problems.alone()
    with alone.use():
        theirs = reported(alone) if runtime.is_root else 0
    theirs = communicator.broadcast_object(theirs)
    worst = float(np.abs(np.divide(ours, theirs) - 1).max())
    note(f"reported loss, {name}", worst)
    assert worst <= 1e-6


def two_outputs(runtime, second):
    inputs = keras.Input((6,), dtype="int32")
    masked = keras.layers.Embedding(20, 4, mask_zero=True)(inputs)
    pooled = keras.layers.GlobalAveragePooling1D()(masked)
    outputs = [keras.layers.Dense(1)(masked), keras.layers.Dense(1)(pooled)]
    model = keras.Model(inputs, outputs)
    model.compile(runtime.distribute(keras.optimizers.SGD(0.1)), ["mse", second])
    return model


@once
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_losses_divided_by_two_numbers_are_refused(runtime, reduction):
    x, y = problems.tokens()
    model = two_outputs(runtime, keras.losses.MeanSquaredError(reduction=reduction))
    runtime.broadcast(model)
    data = runtime.shard((x, (y, y[:, 0])), batch_size=16)
    with pytest.raises(ValueError, match=r"reduction"):
        model.fit(data, verbose=0)


@three
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_embeddings_are_reduced_by_rows(runtime, note, kind, positions, monkeypatch):
    """Keras squares each looked-up row by itself in Adam: rows must not be added up before."""
    communicator = runtime.communicator.inner
    lengths: list[tuple[str, int]] = []
    if runtime.backend == "mpi":
        real, rows = communicator._sum, communicator.concat_rows
        monkeypatch.setattr(
            communicator, "_sum", lambda flat: lengths.append(("sum", flat.size)) or real(flat)
        )
        monkeypatch.setattr(
            communicator, "concat_rows", lambda t, n: lengths.append((n, 0)) or rows(t, n)
        )

    def build(runtime):
        optimizer = getattr(keras.optimizers, kind)(0.1)
        return tagger(runtime, "mse", mask=False, optimizer=optimizer, positions=positions)

    worst = difference(runtime, build, problems.tokens())
    note(f"weights, embedding by {kind}{', and of positions' * positions}", worst)
    assert worst <= 1e-6
    if lengths:
        assert any("sparse" in name for name, _ in lengths)
        sums = {size for name, size in lengths if name == "sum"}
        assert not sums & {20 * 4, 20 * 4 + 5}, "the table was made dense"
        assert (6 * 4 in sums) == positions, "rows that all ranks looked up are summed"


def classifier(runtime, optimizer, **compile_options):
    model = problems.mlp(16, seed=3)
    model.compile(
        runtime.distribute(optimizer), "sparse_categorical_crossentropy", **compile_options
    )
    return model


@three
def test_accumulated_gradients_travel_on_update_steps_only(runtime, communicator, monkeypatch):
    if runtime.backend != "mpi":
        return  # test_collectives.py counts Horovod's in its timeline
    sizes = []
    real = communicator.inner._sum
    monkeypatch.setattr(communicator.inner, "_sum", lambda f: sizes.append(f.size) or real(f))
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    weights_of(runtime, lambda r: classifier(r, optimizer), problems.digits(96), batch_size=16)
    parameters = 64 * 16 + 16 + 16 * 10 + 10
    assert sizes.count(parameters) == 2 * 6 // 4  # epochs, steps, of which one in four updates
    assert sizes.count(1 + len(flags.NAMES)) == 2 * 6, "the counts and flags, each step"
    assert len(sizes) == 3 + 12


@three
@pytest.mark.parametrize(("wire", "limit"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_precision_on_the_wire(runtime, communicator, note, wire, limit):
    halved = Runtime(communicator, gradient_compression=wire)
    worst = difference(
        halved, lambda r: classifier(r, keras.optimizers.SGD(0.1)), problems.digits(96)
    )
    note(f"weights, gradients in {wire}", worst)
    assert 1e-8 < worst <= limit


@three
def test_a_non_finite_step_on_one_rank_skips_it_on_all(runtime, communicator):
    keras.utils.set_random_seed(3)
    half = keras.layers.Dense(1, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((4,)), half])
    model.compile(runtime.distribute(keras.optimizers.SGD(0.1)), "mse")
    model.optimizer = keras.optimizers.LossScaleOptimizer(model.optimizer, initial_scale=8.0)
    runtime.broadcast(model)
    before = model.get_weights()
    x = np.ones((9, 4), "float32")
    for bad in (0.0, np.inf, 0.0):
        x[4] = bad  # the middle rank's alone
        model.fit(runtime.shard((x, np.ones((9, 1))), batch_size=9), verbose=0)
    inner = model.optimizer.inner_optimizer
    state = [int(inner.iterations.numpy()), float(model.optimizer.dynamic_scale.numpy())]
    assert state == [2, 4.0]
    everyone = communicator.allgather_object(problems.bits(model.get_weights()))
    assert all(other == everyone[0] for other in everyone)
    assert problems.worst(model.get_weights(), before) > 0
    assert all(np.isfinite(w).all() for w in model.get_weights())


@once
@pytest.mark.parametrize("accumulate", [None, 2])
def test_mixed_precision_by_policy(runtime, communicator, accumulate):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = problems.mlp(16, seed=3)
        optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulate)
        model.compile(runtime.distribute(optimizer), "sparse_categorical_crossentropy")
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    runtime.broadcast(model)
    history = model.fit(
        runtime.shard(problems.digits(293), batch_size=64), epochs=3, verbose=0
    ).history
    assert is_distributed(model.optimizer)
    assert history["loss"][-1] < history["loss"][0]
    everyone = communicator.allgather_object(problems.bits(model.get_weights()))
    assert all(other == everyone[0] for other in everyone)


@once
@pytest.mark.parametrize("steps", [3, 50])
def test_several_steps_per_execution(runtime, note, steps):
    worst = difference(
        runtime,
        lambda r: classifier(r, keras.optimizers.Adam(), steps_per_execution=steps),
        problems.digits(113),
    )
    note(f"weights, {steps} steps per execution", worst)
    assert worst <= 1e-6


@keras.saving.register_keras_serializable("tests")
class Twice(keras.Model):
    """A step of the user's own: two losses, an apply of its own."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=outputs)
            loss += 0.1 * tf.reduce_mean(tf.square(outputs))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"mine": loss}


@once
def test_a_train_step_of_the_users(runtime, note):
    def build(runtime):
        model = Twice(*(lambda m: (m.inputs, m.outputs))(problems.mlp(16, seed=3)))
        model.compile(
            runtime.distribute(keras.optimizers.SGD(0.1, momentum=0.9)),
            "sparse_categorical_crossentropy",
        )
        return model

    worst = difference(runtime, build, problems.digits(113))
    note("weights, a train_step of the user's", worst)
    assert worst <= 1e-6


class Pair(keras.Model):
    """Two networks with an optimizer each, and steps in turn, as adversarial training has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = problems.mlp(8, seed=1), problems.mlp(8, seed=2)
        self.built = True

    def compile(self, first: Any, second: Any) -> None:
        super().compile()
        self.first_optimizer, self.second_optimizer = first, second

    def train_step(self, data: Any) -> Any:
        x, y = data
        for _ in range(2):
            self._step(self.first, self.first_optimizer, x, y)
        return {"loss": self._step(self.second, self.second_optimizer, x, y)}

    def _step(self, network: Any, optimizer: Any, x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, network(x, training=True))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, network.trainable_variables)
        optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))
        return loss


def pair(runtime, second=True):
    optimizers = [keras.optimizers.Adam(1e-2), keras.optimizers.SGD(0.1, momentum=0.9)]
    model = Pair()
    model.compile(
        runtime.distribute(optimizers[0]),
        runtime.distribute(optimizers[1]) if second else optimizers[1],
    )
    return model


@once
def test_two_optimizers(runtime, note):
    worst = difference(runtime, pair, problems.digits(113))
    note("weights, two optimizers", worst)
    assert worst <= 1e-6


@once
def test_one_of_two_optimizers_not_distributed_is_found(runtime):
    with pytest.raises(DivergedError, match="the optimizer is not distributed"):
        weights_of(runtime, lambda r: pair(r, second=False), problems.digits(113))


def test_train_on_batch(runtime):
    """A loop of one's own over uneven parts, with sample weights and without."""
    x, y = problems.digits(24)
    w = np.linspace(0.5, 2, 24, dtype="float32")

    def trained(of: Runtime) -> list[np.ndarray]:
        model = problems.mlp(16, seed=3)
        optimizer = of.distribute(keras.optimizers.SGD(0.1))
        model.compile(optimizer, "sparse_categorical_crossentropy")
        of.broadcast(model)
        parts = np.array_split(np.arange(24), of.size)[of.rank]
        for weights in (None, None, w[parts]):
            model.train_on_batch(x[parts], y[parts], weights)
        return model.get_weights()

    ours = trained(runtime)
    everyone = runtime.communicator.allgather_object(problems.bits(ours))
    assert everyone == [everyone[0]] * runtime.size
    assert problems.worst(ours, trained(problems.alone())) <= 1e-6
