"""Every kind of input trains as one process does, and a rank reads its part of the bytes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from orchestrator import NpzFiles, TFRecordFiles, callbacks
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.runtime import Runtime
from tests.distributed import problems
from tests.distributed.rank_plugin import once, three

# 3 x 64 + 1: uneven parts, and in the last step all ranks but one are empty.
COUNT, BATCH = 193, 64


class Rounds(keras.utils.PyDataset):
    """The digits in batches."""

    def __init__(self, arrays: Any) -> None:
        super().__init__(workers=2)
        self._arrays = arrays

    @property
    def num_batches(self) -> int:
        return -(-COUNT // BATCH)

    def __getitem__(self, index: int) -> Any:
        return tuple(array[index * BATCH : (index + 1) * BATCH] for array in self._arrays)


def batches(arrays, epochs=2):
    data = Rounds(arrays)
    for _ in range(epochs):
        for index in range(data.num_batches):
            yield data[index]


def parse(record):
    features = {
        "x": tf.io.FixedLenFeature([64], tf.float32),
        "y": tf.io.FixedLenFeature([], tf.int64),
    }
    parsed = tf.io.parse_single_example(record, features)
    return parsed["x"], tf.cast(parsed["y"], tf.int32)


def tfrecords(folder: Path, arrays):
    for file in range(3):
        with tf.io.TFRecordWriter(str(folder / f"{file}.tfrecord")) as writer:
            for x, y in zip(*(a[file * 70 : (file + 1) * 70] for a in arrays), strict=True):
                floats = tf.train.Feature(float_list=tf.train.FloatList(value=x))
                label = tf.train.Feature(int64_list=tf.train.Int64List(value=[y]))
                features = tf.train.Features(feature={"x": floats, "y": label})
                writer.write(tf.train.Example(features=features).SerializeToString())


def npz(folder: Path, arrays):
    for file in range(3):
        x, y = (array[file * 70 : (file + 1) * 70] for array in arrays)
        np.savez(folder / f"{file}.npz", x=x, y=y)


def of_memmap(folder, arrays):
    mapped = np.load(folder / "x.npy", mmap_mode="r")
    return mapped, arrays[1]


# What writes the files, on rank 0; what is given to shard(); and whether it can be shuffled.
SOURCES: dict[str, Any] = {
    "pandas": (None, lambda f, a: (pd.DataFrame(a[0]), pd.Series(a[1])), True),
    "memmap": (lambda f, a: np.save(f / "x.npy", a[0]), of_memmap, True),
    "tfrecord": (tfrecords, lambda f, a: TFRecordFiles(f"{f}/*.tfrecord", parse), True),
    "npz": (npz, lambda f, a: NpzFiles(f"{f}/*.npz", ("x", "y")), True),
    "dataset": (None, lambda f, a: tf.data.Dataset.from_tensor_slices(a).batch(BATCH), False),
    "py-dataset": (None, lambda f, a: Rounds(a), False),
    "generator": (None, lambda f, a: batches(a), False),
}


def model_of(runtime, **compiled):
    model = problems.mlp(8)
    model.compile(
        runtime.distribute(keras.optimizers.SGD(0.1, momentum=0.9)),
        "sparse_categorical_crossentropy",
        **compiled,
    )
    runtime.broadcast(model)
    return model


def trained(runtime, data, **options):
    """The weights after two epochs, and the last epoch's global logs."""
    model = model_of(runtime, metrics=["accuracy"])
    with runtime.use():
        history = model.fit(
            data, epochs=2, verbose=0, callbacks=[callbacks.GlobalMetrics()], **options
        ).history
    return model.get_weights(), history


def as_alone(runtime, communicator, note, name, ours, reference):
    """Compares weights and history with those that `reference` makes on rank 0."""
    theirs = communicator.broadcast_object(reference() if runtime.is_root else None)
    difference = problems.worst(ours[0], theirs[0])
    note(f"weights, {name}", difference)
    assert difference <= 1e-6
    assert ours[1].keys() == theirs[1].keys()
    for key, values in theirs[1].items():
        np.testing.assert_allclose(ours[1][key], values, rtol=1e-5, atol=1e-6, err_msg=key)


@functools.cache
def in_memory(shuffle: bool, seed: int) -> Any:
    """What one process gets from the same samples as arrays."""
    alone = Runtime(SingleCommunicator(), seed=seed)
    return trained(alone, alone.shard(problems.digits(COUNT), batch_size=BATCH, shuffle=shuffle))


@three
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_trains_as_one_process_does(runtime, communicator, note, shared_path, name):
    arrays = problems.digits(COUNT)
    write, make, shuffle = SOURCES[name]
    if write is not None:
        runtime.on_root(lambda: write(shared_path, arrays))
    options: Any = {"batch_size": BATCH, "shuffle": True} if shuffle else {}
    fit: Any = {"steps_per_epoch": 4} if name == "generator" else {}
    ours = trained(runtime, runtime.shard(make(shared_path, arrays), **options), **fit)
    as_alone(runtime, communicator, note, name, ours, lambda: in_memory(shuffle, runtime.seed))


def by_keras(arrays, **options):
    """What Keras itself does in one process, without any of ours."""
    model = problems.mlp(8)
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    options = {"epochs": 2, "verbose": 0, "shuffle": False, "batch_size": BATCH, **options}
    history = model.fit(*arrays, **options).history
    return model.get_weights(), history


@once
def test_class_weight(runtime, communicator, note):
    arrays = problems.digits(COUNT)
    weights = {digit: 0.2 + digit / 3 for digit in range(10)}
    data = runtime.shard(arrays, batch_size=BATCH)
    ours = trained(runtime, data, class_weight=weights)
    as_alone(
        runtime,
        communicator,
        note,
        "class_weight",
        ours,
        lambda: by_keras(arrays, class_weight=weights),
    )


@once
def test_validation_split_and_freq(runtime, communicator, note):
    arrays = problems.digits(COUNT)
    training, validation = runtime.shard(arrays, batch_size=BATCH, validation_split=0.3)
    ours = trained(runtime, training, validation_data=validation, validation_freq=2)
    assert len(ours[1]["val_loss"]) == 1
    as_alone(
        runtime,
        communicator,
        note,
        "validation_split",
        ours,
        lambda: by_keras(arrays, validation_split=0.3, validation_freq=2),
    )


@once
def test_steps_per_epoch_and_validation_steps(runtime, communicator, note):
    """The second epoch goes on where the first one stopped, and so does the validation."""
    arrays, held = problems.digits(COUNT), problems.digits(COUNT, 300)
    options = {"steps_per_epoch": 2, "validation_steps": 2}
    validation = runtime.shard(held, batch_size=BATCH)
    ours = trained(
        runtime, runtime.shard(arrays, batch_size=BATCH), validation_data=validation, **options
    )
    as_alone(
        runtime,
        communicator,
        note,
        "steps",
        ours,
        lambda: by_keras(arrays, validation_data=held, **options),
    )


def bytes_read() -> int:
    """By this process's system calls since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@three
@pytest.mark.parametrize("kind", ["tfrecord", "npz"])
def test_a_rank_reads_its_part_of_the_bytes(runtime, communicator, note, shared_path, kind):
    def write():
        for file in range(4):
            rows = np.random.default_rng(file).standard_normal((36, 5000)).astype("float32")
            if kind == "npz":
                np.savez(shared_path / f"{file}.npz", x=rows)
                continue
            with tf.io.TFRecordWriter(str(shared_path / f"{file}.tfrecord")) as writer:
                for row in rows:
                    writer.write(row.tobytes())

    runtime.on_root(write)
    whole = sum(path.stat().st_size for path in shared_path.iterdir())
    files = (NpzFiles if kind == "npz" else TFRecordFiles)(f"{shared_path}/*")
    before = bytes_read()
    dataset = runtime.shard(files, batch_size=24, shuffle=True)
    scanned = bytes_read()
    assert sum(1 for _ in dataset) == 6
    read = bytes_read() - scanned
    note(f"{kind}: bytes read / (all / ranks)", read * runtime.size / whole)
    note(f"{kind}: bytes looked through / all", (scanned - before) / whole)
    assert read == pytest.approx(whole / runtime.size, rel=0.05)
    everyone = communicator.allgather_object((before, scanned, read))
    print(json.dumps({"whole": whole, "ranks": [read for _, _, read in everyone]}))
