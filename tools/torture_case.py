"""What tools/torture trains: a small network with everything in it that a resume could forget.

Dropout, augmentation, BatchNormalization; shuffled arrays. And the digits of launch/digits.py.
Steps take a while, and tell how many were made: the folder named by TORTURE_FOLDER holds a process
id and a count for each rank.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from orchestrator.runtime import current

STEP_SECONDS = 0.03


def data(global_batch_size: int, seed: int):
    """Pictures whose label is in which half they are brighter; arrays, which `shard` shuffles."""
    _tell("pid", os.getpid())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8, 8, 1)).astype("float32")
    y = (x[:, :4].mean((1, 2, 3)) > x[:, 4:].mean((1, 2, 3))).astype("int32")
    return (x[:230], y[:230]), (x[230:], y[230:])


class Pace(keras.layers.Layer):
    """Gives back its input, in training after a while."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = itertools.count(1)

    def call(self, inputs, training=False):
        """Waits, and tells the number of the step, where training."""
        if not training:
            return inputs
        with tf.control_dependencies([tf.numpy_function(self._wait, [], tf.int64)]):
            return tf.identity(inputs)

    def _wait(self) -> np.int64:
        time.sleep(STEP_SECONDS)
        number = next(self._steps)
        _tell("steps", number)
        return np.int64(number)

    def compute_output_spec(self, inputs, training=False):
        """Of the input's shape, and another tensor: else the layer would not be in the model."""
        return keras.KerasTensor(inputs.shape, inputs.dtype)


def model() -> keras.Model:
    """Compiled, with a rate high enough for plateaus."""
    net = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            Pace(),
            keras.layers.RandomTranslation(0.1, 0.1),
            keras.layers.Conv2D(6, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    net.compile(
        keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return net


def digits_data(global_batch_size: int, seed: int):
    """Those of launch/digits.py: a `tf.data.Dataset` that shuffles by itself."""
    _tell("pid", os.getpid())
    return importlib.import_module("digits").data(global_batch_size, seed)


def digits_model() -> keras.Model:
    """That of launch/digits.py, with steps that take a while."""
    layers = importlib.import_module("digits").model().layers
    net = keras.Sequential([keras.Input((8, 8, 1)), Pace(), *layers])
    net.compile(
        keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return net


def _tell(what: str, value: int) -> None:
    folder = os.environ.get("TORTURE_FOLDER")
    if folder:
        path = Path(folder) / f"{what}-{current().rank}"
        temporary = path.with_suffix(".new")
        temporary.write_text(str(value))
        temporary.rename(path)
