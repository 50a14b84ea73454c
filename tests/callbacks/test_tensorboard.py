"""TensorBoard: what its own reader finds in the event files."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator as accumulators

from orchestrator import callbacks
from orchestrator.checkpoint.retention import EverySteps
from orchestrator.config import SettingError
from tests.callbacks.models import X, Y, fit, make
from tests.callbacks.test_backup_and_restore import Interrupt, end
from tests.callbacks.test_learning_rate_scheduler import two_optimizers


def read(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each scalar, as TensorBoard shows them."""
    reader = accumulators.EventAccumulator(str(folder), {accumulators.TENSORS: 0})
    reader.Reload()
    found = {}
    for tag in reader.Tags()["tensors"]:
        values = [(e.step, tf.make_ndarray(e.tensor_proto)) for e in reader.Tensors(tag)]
        found[tag] = [
            (s, float(v) if v.size == 1 and v.dtype.kind == "f" else v) for s, v in values
        ]
    return found


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def column(values) -> Any:
    return list(enumerate(pytest.approx(v, rel=1e-6) for v in values))


def test_epochs(tmp_path):
    history = fit(make(), callbacks.TensorBoard(str(tmp_path)), epochs=3).history
    train, val = read(tmp_path / "train"), read(tmp_path / "validation")
    assert set(train) == {"keras", "epoch_loss", "epoch_accuracy", "epoch_learning_rate"}
    assert train["epoch_loss"] == column(history["loss"])
    assert train["epoch_learning_rate"] == column([0.1] * 3)
    assert val["epoch_loss"] == column(history["val_loss"])
    evaluation = val["evaluation_loss_vs_iterations"]
    assert [step for step, _ in evaluation] == [3, 6, 9]
    assert [value for _, value in evaluation] == pytest.approx(history["val_loss"])
    assert len(train["keras"]) == 1


def both(tmp_path, **options):
    """What Keras's and ours write of one training."""
    found = []
    for module in (keras.callbacks.TensorBoard, callbacks.TensorBoard):
        folder = tmp_path / module.__module__
        keras.backend.clear_session()  # the same names
        fit(make(run_eagerly=False), module(str(folder), **options), epochs=2)
        found.append({part: read(folder / part) for part in ("train", "validation")})
    return found


@pytest.mark.parametrize("update_freq", ["epoch", "batch"])
def test_the_same_as_keras(tmp_path, update_freq):
    theirs, ours = both(tmp_path, update_freq=update_freq, histogram_freq=1)
    for part, scalars in theirs.items():
        assert set(ours[part]) == set(scalars)
        for tag, values in scalars.items():
            assert [step for step, _ in ours[part][tag]] == [step for step, _ in values], tag
            if isinstance(values[0][1], float):
                assert ours[part][tag] == values, tag


@pytest.mark.parametrize(
    ("optimizer", "tags"),
    [
        (two_optimizers, {"epoch_learning_rate_all", "epoch_learning_rate_biases"}),
        (
            lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 6)),
            {"epoch_learning_rate"},
        ),
    ],
)
def test_learning_rates(tmp_path, optimizer, tags):
    found = []
    for module in (keras.callbacks, callbacks):
        folder = tmp_path / module.__name__
        fit(make(optimizer=optimizer()), module.TensorBoard(str(folder)), epochs=2)
        train = read(folder / "train")
        found.append({tag: values for tag, values in train.items() if "learning_rate" in tag})
    assert found[0] == found[1]
    assert set(found[1]) == tags


def test_it_waits_for_no_value(tmp_path):
    """A metric's tensor that is asked for its number holds up the steps behind it."""
    value: Any = tf.constant(0.5)
    value.numpy = lambda: pytest.fail("asked for its number")
    board, logs = callbacks.TensorBoard(str(tmp_path)), {"told": value}
    board.set_model(make())
    board.on_train_begin()
    board.on_epoch_begin(0)
    board.on_train_batch_begin(0)
    board.on_train_batch_end(0, logs)
    board.on_epoch_end(0, logs)
    board.on_train_end()
    assert read(tmp_path / "train")["epoch_told"] == [(0, 0.5)]


def test_every_second_batch(tmp_path):
    theirs, ours = both(tmp_path, update_freq=2)
    assert ours["train"]["batch_loss"] == theirs["train"]["batch_loss"]
    assert [step for step, _ in ours["train"]["batch_loss"]] == [2, 4, 6]
    # Keras leaves out the epochs whose last batch is not a second one.
    assert [step for step, _ in theirs["train"]["epoch_loss"]] == [1]
    assert [step for step, _ in ours["train"]["epoch_loss"]] == [0, 1]


def test_no_file_that_is_not_needed(tmp_path):
    board = callbacks.TensorBoard(str(tmp_path), write_graph=False)
    model = make()
    fit(model, board, validation_data=None)
    (file,) = files(tmp_path)
    assert file.startswith("train/events.out.tfevents.")
    shutil.rmtree(tmp_path)
    model.evaluate(X, Y, verbose=0, callbacks=[callbacks.TensorBoard(str(tmp_path), 0, False)])
    (file,) = files(tmp_path)
    assert file.startswith("validation/")
    assert [step for step, _ in read(tmp_path / "validation")["evaluation_loss_vs_iterations"]] == [
        3
    ]


def test_a_second_fit_and_an_evaluation(tmp_path):
    board, model = callbacks.TensorBoard(str(tmp_path)), make()
    fit(model, board, epochs=2)
    fit(model, board, epochs=4, initial_epoch=2)
    model.evaluate(X, Y, verbose=0, callbacks=[board])
    assert [step for step, _ in read(tmp_path / "train")["epoch_loss"]] == [0, 1, 2, 3]
    steps = [s for s, _ in read(tmp_path / "validation")["evaluation_loss_vs_iterations"]]
    assert steps == [3, 6, 9, 12, 12]


@pytest.mark.parametrize("module", [keras.callbacks, callbacks])
def test_summaries_of_the_model(tmp_path, module):
    class Telling(keras.layers.Layer):
        def call(self, x):
            tf.summary.scalar("mean", tf.reduce_mean(x))
            return x

    model = keras.Sequential([keras.Input((3,)), Telling(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    fit(model, module.TensorBoard(str(tmp_path), update_freq=1))
    train = read(tmp_path / "train")
    (tag,) = (tag for tag in train if tag.endswith("mean"))
    assert train[tag]


def test_projector_images_and_profile(tmp_path):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Embedding(10, 4, name="table"), keras.layers.Flatten()]
    )
    model.add(keras.layers.Dense(1))
    model.compile("sgd", "mse", jit_compile=False)
    board = callbacks.TensorBoard(
        str(tmp_path),
        histogram_freq=1,
        write_images=True,
        write_steps_per_second=True,
        profile_batch=2,
        embeddings_freq=1,
        embeddings_metadata={"table": "words.tsv"},
    )
    model.fit(np.zeros((12, 3)), Y, 4, verbose=0, callbacks=[board])
    assert 'metadata_path: "words.tsv"' in (tmp_path / "projector_config.pbtxt").read_text()
    assert (tmp_path / "train" / "keras_embedding.ckpt-0.weights.h5").exists()
    train = read(tmp_path / "train")
    assert any(tag.endswith("table/embeddings/histogram") for tag in train)
    assert any(tag.endswith("/image") for tag in train)
    assert train["epoch_steps_per_second"][0][1] > 0
    assert any(file.endswith(".xplane.pb") for file in files(tmp_path))


def run(folder, store, *others, **options):
    board = callbacks.TensorBoard(str(folder), update_freq=1, **options)
    saver = callbacks.StoreCheckpoint(str(store), resume=True, save=EverySteps(4))
    try:
        return fit(make(), board, *others, saver, epochs=4)
    finally:
        end(saver)


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """A log_dir, and a function that copies it to a local folder for TensorBoard's reader."""
    if request.param == "local":
        yield str(tmp_path / "logs"), lambda: tmp_path / "logs"
        return
    memory = fsspec.filesystem("memory")

    def fetch():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        memory.get("/boards/logs", str(tmp_path / "copy"), recursive=True)
        return tmp_path / "copy"

    yield "memory://boards/logs", fetch
    memory.rm("/boards", recursive=True)


@pytest.mark.parametrize("after", [7, 9, 10])
def test_continued_without_gaps_or_doubles(tmp_path, place, after):
    """Saved after 4 and 8 steps of 3 an epoch; killed later: what was written between goes."""
    log_dir, fetch = place
    run(tmp_path / "whole", tmp_path / "a")
    with pytest.raises(InterruptedError):
        run(log_dir, tmp_path / "b", Interrupt(after))
    before = files(fetch())
    run(log_dir, tmp_path / "b")
    for part in ("train", "validation"):
        ours, whole = read(fetch() / part), read(tmp_path / "whole" / part)
        assert set(ours) == set(whole)
        for tag, values in whole.items():
            assert [step for step, _ in ours[tag]] == [step for step, _ in values], tag
            if isinstance(values[0][1], float):
                assert ours[tag] == values, tag
    assert set(before) <= set(files(fetch()))


def test_of_a_file_begun_after_the_checkpoint_nothing_is_left(tmp_path):
    """And another run's files stay."""
    other = tmp_path / "logs" / "train" / "events.out.tfevents.1.other.0.v2"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of another run")
    with pytest.raises(InterruptedError):
        run(tmp_path / "logs", tmp_path / "store", Interrupt(5))
    with pytest.raises(InterruptedError):
        run(tmp_path / "logs", tmp_path / "store", Interrupt(2))  # in a file of its own
    run(tmp_path / "logs", tmp_path / "store")
    assert other.read_bytes() == b"of another run"
    other.unlink()
    steps = [step for step, _ in read(tmp_path / "logs" / "train")["batch_loss"]]
    assert steps == list(range(1, 13))


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SettingError, match=r"keras-orchestrator\[tensorboard\]"):
        fit(make(), callbacks.TensorBoard(str(tmp_path)))
    assert os.listdir(tmp_path) == []
