"""A model's steps on many ranks: empty parts, the first-step comparison, XLA, late building."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator import steps
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.optimizer import distribute
from orchestrator.steps import DivergedError, prepare
from tests.fakes import FakeCommunicator


def quiet(message: str) -> None:
    pass


def make(communicator, *layers, metrics=("mae",), built=True, **options) -> keras.Model:
    keras.utils.set_random_seed(5)
    first = [keras.Input((3,))] if built else []
    model = keras.Sequential([*first, *layers, keras.layers.Dense(1)])
    optimizer = distribute(keras.optimizers.SGD(0.1), communicator)
    model.compile(optimizer, "mse", metrics=list(metrics), **options)
    return model


def dataset(*lengths: int) -> tf.data.Dataset:
    """Batches of given lengths, of a size unknown while tracing, as `shard` makes them."""

    def generate():
        for length in lengths:
            x = np.arange(length * 3, dtype="float32").reshape(length, 3) / 10
            yield x, x.sum(1, keepdims=True)

    spec = (tf.TensorSpec((None, 3), tf.float32), tf.TensorSpec((None, 1), tf.float32))
    return tf.data.Dataset.from_generator(generate, output_signature=spec).apply(
        tf.data.experimental.assert_cardinality(len(lengths))
    )


def test_one_rank_is_left_alone():
    model = make(SingleCommunicator())
    assert prepare(model, SingleCommunicator(), quiet) is None
    assert "train_step" not in vars(model)


def test_once_a_model():
    communicator = FakeCommunicator()
    model = make(communicator)
    first = prepare(model, communicator, quiet)
    step = model.train_step
    assert prepare(model, communicator, quiet) is first
    assert model.train_step is step
    assert isinstance(first, steps.Steps)


def test_two_alike_ranks_train_as_one():
    single = make(SingleCommunicator())
    communicator = FakeCommunicator()
    double = make(communicator)
    made = prepare(double, communicator, quiet)
    assert made is not None
    made.broadcast()
    for model in (single, double):
        model.fit(dataset(4, 4, 2), epochs=2, verbose=0)
    for one, two in zip(single.get_weights(), double.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)
    # the weights' and the seeds' broadcast, then the comparison: once, whatever the steps
    assert communicator.calls == ["broadcast", "allgather_object"]


def test_sample_counts_weigh_uneven_ranks():
    """The other rank has one sample a step, with gradient zero: updates shrink by n / (n + 1)."""

    def quiet_rank(bucket):
        return [*map(tf.zeros_like, bucket[:-1]), tf.constant(1.0)]

    single, communicator = make(SingleCommunicator()), FakeCommunicator(gradients=quiet_rank)
    double = make(communicator)
    prepare(double, communicator, quiet)
    before = single.get_weights()
    single.fit(dataset(3), verbose=0)
    double.fit(dataset(3), verbose=0)
    for start, one, two in zip(before, single.get_weights(), double.get_weights(), strict=True):
        np.testing.assert_allclose(two - start, (one - start) * 3 / 4, rtol=1e-4, atol=1e-7)


def test_an_empty_part_takes_part_and_leaves_no_trace():
    communicator = FakeCommunicator(gradients=lambda bucket: [tf.ones_like(t) for t in bucket])
    model = make(communicator, keras.layers.BatchNormalization())
    prepare(model, communicator, quiet)
    model.fit(dataset(4), verbose=0)
    norm = model.layers[0]
    moving = norm.moving_mean.numpy().copy()
    weights = [w.numpy().copy() for w in model.trainable_weights]
    logs = {}
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, said: logs.update(said))
    model.fit(dataset(0), verbose=0, callbacks=[keep])
    np.testing.assert_array_equal(norm.moving_mean.numpy(), moving)
    assert [float(v.numpy()) for m in model.metrics[:1] for v in m.variables] == [0.0, 0.0]
    # the other rank's gradient, 1 from 1 sample, was applied here too
    for before, after in zip(weights, model.trainable_weights, strict=True):
        np.testing.assert_allclose(after.numpy(), before - 0.1, rtol=1e-5, atol=1e-6)
    assert int(model.optimizer.iterations.numpy()) == 2


def test_an_empty_part_in_an_evaluation():
    communicator = FakeCommunicator()
    model = make(communicator)
    plain = make(SingleCommunicator())
    prepare(model, communicator, quiet)
    expected = plain.evaluate(dataset(4, 2), verbose=0, return_dict=True)
    model.evaluate(dataset(4, 0, 2, 0), verbose=0)
    result = {k: float(v) for k, v in model.get_metrics_result().items()}
    assert result == pytest.approx(expected, rel=1e-6)


def other_rank(change):
    """What a second rank says whose entry is `change` of this one's."""

    def gather(mine):
        theirs = {**mine, "digests": list(mine["digests"])}
        change(theirs)
        return [mine, theirs]

    return gather


def differ(said) -> None:
    path, shape, _ = said["digests"][1]
    said["digests"][1] = (path, shape, "0" * 16)


@pytest.mark.parametrize(
    ("distributed", "broadcast", "cause"),
    [
        (False, True, r"optimizer is not distributed.*runtime\.distribute"),
        (True, False, r"no broadcast.*runtime\.broadcast\(model\)"),
        (True, True, "did not run the same step"),
    ],
)
def test_diverged_ranks_name_the_cause(distributed, broadcast, cause):
    communicator = FakeCommunicator(gather=other_rank(differ))
    model = make(communicator if distributed else SingleCommunicator())
    made = prepare(model, communicator, quiet)
    assert made is not None
    if broadcast:
        made.broadcast()
    with pytest.raises(DivergedError, match=cause) as caught:
        model.fit(dataset(4), verbose=0)
    assert "'sequential" in str(caught.value)
    assert "rank(s) 1" in str(caught.value)


def test_ranks_with_other_models():
    def less(said) -> None:
        said["digests"].pop()

    communicator = FakeCommunicator(gather=other_rank(less))
    model = make(communicator)
    prepare(model, communicator, quiet)
    with pytest.raises(DivergedError, match="different numbers of variables"):
        model.fit(dataset(4), verbose=0)


def test_the_comparison_sees_optimizer_state():
    seen = []

    def gather(mine):
        seen.extend(path for path, _, _ in mine["digests"])
        return [mine, mine]

    communicator = FakeCommunicator(gather=gather)
    model = make(communicator)
    prepare(model, communicator, quiet)
    model.fit(dataset(4), verbose=0)
    assert any(path.endswith("iteration") for path in seen)
    assert any(path.endswith("kernel") for path in seen)


def test_a_model_built_by_its_first_batch_is_broadcast_then():
    communicator = FakeCommunicator()
    model = make(communicator, built=False)
    made = prepare(model, communicator, quiet)
    assert made is not None
    made.broadcast()
    assert communicator.calls == []
    model.fit(dataset(4, 4), verbose=0, epochs=2)
    assert communicator.calls == ["broadcast", "allgather_object"]
    plain = make(SingleCommunicator(), built=False)
    plain.fit(dataset(4, 4), verbose=0, epochs=2)
    for one, two in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_a_model_built_by_its_first_batch_starts_from_the_roots_weights():
    root = np.full(4, 0.25, np.float32)  # kernel and bias; SGD's own variables after them

    def broadcast(flat):
        return np.concatenate([root.view(np.uint8), flat[root.nbytes :]])

    def still(bucket):
        return [*map(tf.negative, bucket[:-1]), tf.constant(1.0)]

    communicator = FakeCommunicator(1, 2, broadcast=broadcast, gradients=still)
    model = make(communicator, built=False)
    made = prepare(model, communicator, quiet)
    assert made is not None
    made.broadcast()
    model.fit(dataset(4), verbose=0)
    for value in model.get_weights():
        np.testing.assert_array_equal(value, np.full(value.shape, 0.25))


def test_a_first_step_that_says_no_shape():
    communicator = FakeCommunicator()
    model = make(communicator, built=False)
    made = prepare(model, communicator, quiet)
    assert made is not None
    made.broadcast()
    with pytest.raises(RuntimeError, match=r"model\.build"):
        model.train_on_batch(np.ones((2, 3)), np.ones((2, 1)))


def test_xla_is_switched_off_and_says_so():
    said = []

    def say(words):
        said.extend([words] if "XLA" in words else [])

    communicator = FakeCommunicator()
    model = make(communicator, jit_compile=True)
    prepare(model, communicator, say)
    model.fit(dataset(4), verbose=0)
    assert model.jit_compile is False
    assert len(said) == 1
    assert "jit_compile=False" in said[0]
    silent = make(communicator, jit_compile=False)
    prepare(silent, communicator, say)
    silent.fit(dataset(4), verbose=0)
    assert len(said) == 1


def test_saved_files_are_plain(tmp_path):
    communicator = FakeCommunicator()
    model = make(communicator)
    prepare(model, communicator, quiet)
    model.fit(dataset(4), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded.optimizer) is keras.optimizers.SGD
    assert "train_step" not in vars(loaded)
    loaded.fit(dataset(4), verbose=0)
    assert int(loaded.optimizer.iterations.numpy()) == 2


def test_sample_weights_and_dict_inputs():
    communicator = FakeCommunicator(gradients=lambda bucket: [tf.ones_like(t) for t in bucket])
    keras.utils.set_random_seed(5)
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}
    outputs = keras.layers.Dense(1)(keras.layers.Concatenate()([inputs["a"], inputs["b"]]))
    model = keras.Model(inputs, outputs)
    model.compile(distribute(keras.optimizers.SGD(0.1), communicator), "mse")
    prepare(model, communicator, quiet)
    data = dataset(4, 0, 2).map(
        lambda x, y: ({"a": x, "b": x + 1}, y, tf.ones_like(y[:, 0])), num_parallel_calls=1
    )
    history = model.fit(data, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert int(model.optimizer.iterations.numpy()) == 3
