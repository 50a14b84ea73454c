"""Snapshots: the files are Keras's own, of the moment of the copy, whatever the model does then."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.checkpoint.state import Snapshot

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = (X.sum(axis=1, keepdims=True) > 0).astype("float32")


def compiled(model: keras.Model, optimizer="adam", run_eagerly=True) -> keras.Model:
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"], run_eagerly=run_eagerly)
    return model


def sequential(*layers, **options) -> keras.Model:
    return compiled(keras.Sequential([keras.Input((4,)), *layers]), **options)


def plain() -> keras.Model:
    return sequential(
        keras.layers.Dense(8, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3, seed=1),
        keras.layers.Dense(1),
    )


def accumulating() -> keras.Model:
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5),
        momentum=0.9,
        use_ema=True,
        gradient_accumulation_steps=2,
    )
    return sequential(keras.layers.Dense(1), optimizer=optimizer)


def half() -> keras.Model:
    return sequential(
        keras.layers.Dense(5, dtype="bfloat16"),
        keras.layers.LayerNormalization(dtype="float16"),
        keras.layers.Dense(1, dtype="mixed_float16"),
        keras.layers.Activation("linear", dtype="float32"),
        optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    )


def frozen() -> keras.Model:
    model = sequential(keras.layers.Dense(5), keras.layers.Dense(1))
    model.layers[0].trainable = False
    return compiled(model)


def lora() -> keras.Model:
    """What it saves is worked out from variables."""
    model = sequential(keras.layers.Dense(5), keras.layers.Dense(1))
    model.layers[0].enable_lora(2)
    return compiled(model)


def vocabulary() -> keras.Model:
    """It saves files beside the weights."""
    words = keras.Input((1,), dtype="string", name="words")
    numbers = keras.Input((4,), name="numbers")
    lookup = keras.layers.StringLookup(output_mode="one_hot")
    lookup.adapt(np.array(["so", "la", "ti"]))
    merged = keras.layers.Concatenate()([lookup(words), numbers])
    return compiled(keras.Model([words, numbers], keras.layers.Dense(1)(merged)))


@keras.saving.register_keras_serializable("tests")
class Nested(keras.Model):
    """Layers in lists and dicts, one of them twice, and a weight of its own."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        shared = keras.layers.Dense(4)
        self.blocks = [shared, [keras.layers.Dense(4), shared]]
        self.heads = {"one": keras.layers.Dense(1), "two": keras.layers.Dense(1)}
        self.scale = self.add_weight(shape=(), name="scale", initializer="ones")
        self.nothing = self.add_weight(shape=(0, 3), name="nothing", trainable=False)

    def call(self, inputs):
        one, (two, three) = self.blocks
        hidden = three(two(one(inputs))) * self.scale
        return self.heads["one"](hidden) + self.heads["two"](hidden)


def nested() -> keras.Model:
    model = Nested()
    model(X)
    return compiled(model)


MODELS = [
    plain,
    accumulating,
    half,
    frozen,
    lora,
    vocabulary,
    nested,
]


def train(model: keras.Model, epochs: int = 1) -> None:
    words = tf.constant([["so"], ["la"], ["mi"], ["fa"]] * 4)
    inputs = {"words": words, "numbers": X} if len(getattr(model, "inputs", [])) > 1 else X
    model.fit(inputs, Y, batch_size=8, epochs=epochs, verbose=0)


def change_all(model: keras.Model) -> None:
    for variable in (*model.variables, *model.optimizer.variables):
        variable.assign(keras.ops.ones_like(variable))


def tree(file) -> dict[str, tuple]:
    """Every group and data set of a weights file: its attributes, type, shape and bytes."""
    found: dict[str, tuple] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        value = ()
        if isinstance(item, h5py.Dataset):
            value = (item.dtype, item.shape, np.asarray(item[()]).tobytes())
        found[name] = (dict(item.attrs), *value)

    with h5py.File(file) as opened:
        opened.visititems(visit)
    return found


def members(path: Path) -> dict[str, object]:
    """A `.keras` archive's members but the date, the weights as a tree."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        found: dict[str, object] = {n: archive.read(n) for n in sorted(archive.namelist())}
    del found["metadata.json"]
    weights = found["model.weights.h5"]
    assert isinstance(weights, bytes)
    return found | {"model.weights.h5": tree(io.BytesIO(weights))}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_files_are_kerass_own_of_the_time_of_the_copy(tmp_path, make):
    model = make()
    train(model)
    snapshot = Snapshot(model)
    change_all(model)
    snapshot.copy()
    train(model)
    snapshot.copy()
    model.save(tmp_path / "keras.keras")
    model.save_weights(tmp_path / "keras.weights.h5")
    change_all(model)
    snapshot.write_weights(str(tmp_path / "ours.weights.h5"))
    snapshot.write_model(str(tmp_path / "ours.keras"))
    assert tree(tmp_path / "ours.weights.h5") == tree(tmp_path / "keras.weights.h5")
    assert members(tmp_path / "ours.keras") == members(tmp_path / "keras.keras")
    for variable in (*model.variables, *model.optimizer.variables):
        np.testing.assert_array_equal(variable, 1, err_msg="the model itself was touched")


@pytest.mark.parametrize("make", [plain, vocabulary, nested], ids=lambda make: make.__name__)
def test_keras_loads_them(tmp_path, make):
    model = make()
    train(model)
    snapshot = Snapshot(model)
    snapshot.copy()
    snapshot.write_weights(str(tmp_path / "m.weights.h5"))
    snapshot.write_model(str(tmp_path / "m.keras"))
    expected = [v.numpy() for v in (*model.weights, *model.optimizer.variables)]
    change_all(model)
    model.load_weights(tmp_path / "m.weights.h5")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for got in (model, loaded):
        values = [v.numpy() for v in (*got.weights, *got.optimizer.variables)]
        for mine, theirs in zip(expected, values, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_the_learning_rate_in_the_configuration_is_that_of_the_copy(tmp_path):
    model = plain()
    train(model)
    model.optimizer.learning_rate.assign(0.25)
    snapshot = Snapshot(model)
    snapshot.copy()
    model.optimizer.learning_rate.assign(0.125)
    snapshot.write_model(str(tmp_path / "m.keras"))
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.optimizer.get_config()["learning_rate"] == 0.25


def test_a_models_training_meanwhile_changes_nothing(tmp_path):
    layers = [keras.layers.Dense(units) for units in (256, 64, 1)]
    model = sequential(*layers, run_eagerly=False)
    train(model)
    snapshot = Snapshot(model)
    snapshot.copy()
    expected = snapshot.write_weights(str(tmp_path / "expected.weights.h5"))
    snapshot.write_model(str(tmp_path / "expected.keras"))
    weights, archives = [], []

    def write() -> None:
        while not done.is_set():
            weights.append(snapshot.write_weights(str(tmp_path / "m.weights.h5")))
            snapshot.write_model(str(tmp_path / "m.keras"))
            archives.append(members(tmp_path / "m.keras") == members(tmp_path / "expected.keras"))

    done = threading.Event()
    thread = threading.Thread(target=write)
    before = int(model.optimizer.iterations.numpy())
    thread.start()
    while len(archives) < 5 and thread.is_alive():
        train(model)
    done.set()
    thread.join()
    assert int(model.optimizer.iterations.numpy()) >= before + 2
    assert set(weights) == {expected}
    assert len(archives) >= 5
    assert all(archives)


def test_an_optimizer_built_later_is_copied_too(tmp_path):
    model = plain()
    snapshot = Snapshot(model)
    small = snapshot.nbytes
    train(model)
    snapshot.copy()
    assert snapshot.nbytes > 2 * small
    model.save_weights(tmp_path / "keras.weights.h5")
    snapshot.write_weights(str(tmp_path / "ours.weights.h5"))
    assert tree(tmp_path / "ours.weights.h5") == tree(tmp_path / "keras.weights.h5")


def test_an_optimizer_built_while_writing_is_not_in_the_file(tmp_path):
    model = plain()
    snapshot = Snapshot(model)
    snapshot.copy()
    model.save(tmp_path / "keras.keras")
    model.save_weights(tmp_path / "keras.weights.h5")
    train(model)
    snapshot.write_model(str(tmp_path / "ours.keras"))
    assert members(tmp_path / "ours.keras") == members(tmp_path / "keras.keras")


def test_a_model_compiled_anew_before_it_was_written(tmp_path):
    model = plain()
    snapshot = Snapshot(model)
    snapshot.copy()
    compiled(model)
    with pytest.raises(RuntimeError, match="The model has changed since it was copied"):
        snapshot.write_model(str(tmp_path / "m.keras"))
    snapshot.copy()
    snapshot.write_model(str(tmp_path / "m.keras"))


@pytest.mark.parametrize("make", [plain, vocabulary, lora], ids=lambda make: make.__name__)
def test_the_digest_is_the_files(tmp_path, make):
    snapshot = Snapshot(make())
    snapshot.copy()
    for write, name in (
        (snapshot.write_weights, "m.weights.h5"),
        (snapshot.write_model, "m.keras"),
    ):
        digest = write(str(tmp_path / name))
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["m.weights.h5", "m.keras"])
def test_a_full_disk(tmp_path, name):
    snapshot = Snapshot(plain())
    snapshot.copy()
    os.symlink("/dev/full", tmp_path / name)
    threads = threading.active_count()
    write = snapshot.write_model if name == "m.keras" else snapshot.write_weights
    with pytest.raises(OSError, match="No space left"):
        write(str(tmp_path / name))
    assert threading.active_count() == threads
    write(str(tmp_path / f"again-{name}"))


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="takes a built model, and 'unbuilt' is not yet"):
        Snapshot(keras.Sequential([keras.layers.Dense(1)], name="unbuilt"))
    snapshot = Snapshot(plain())
    with pytest.raises(RuntimeError, match="nothing to write"):
        snapshot.write_weights(str(tmp_path / "m.weights.h5"))
    snapshot.copy()
    with pytest.raises(ValueError, match=r"must end in '\.weights\.h5'"):
        snapshot.write_weights(str(tmp_path / "m.keras"))
    with pytest.raises(ValueError, match=r"must end in '\.keras'"):
        snapshot.write_model(str(tmp_path / "m.weights.h5"))
    assert os.listdir(tmp_path) == []


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays_as_it_is_over_100_saves(tmp_path):
    model = sequential(keras.layers.Dense(1024), keras.layers.Dense(512), keras.layers.Dense(1))
    train(model)
    snapshot = Snapshot(model)

    def save() -> None:
        snapshot.copy()
        snapshot.write_weights(str(tmp_path / "m.weights.h5"))

    save()
    snapshot.write_model(str(tmp_path / "m.keras"))
    state = snapshot.nbytes
    assert state > 6_000_000
    before = resident()
    for number in range(100):
        save()
        if number % 10 == 0:
            snapshot.write_model(str(tmp_path / "m.keras"))
    assert snapshot.nbytes == state
    # One copy lost per save would be 100 states, one per model 10.
    assert resident() - before < 4 * state


def test_a_save_takes_no_memory_beside_its_buffers(tmp_path):
    model = sequential(keras.layers.Dense(1024), keras.layers.Dense(1024), keras.layers.Dense(1))
    train(model)
    snapshot = Snapshot(model)
    snapshot.copy()
    snapshot.write_model(str(tmp_path / "m.keras"))
    tracemalloc.start()
    try:
        snapshot.copy()
        snapshot.write_weights(str(tmp_path / "m.weights.h5"))
        snapshot.write_model(str(tmp_path / "m.keras"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.1 * snapshot.nbytes
