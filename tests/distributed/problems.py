"""Small models and data that the tests on ranks train."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

from orchestrator import weights
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.runtime import Runtime


def digits(count: int, start: int = 0, one_hot: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`count` handwritten digits in a fixed shuffled order: float32 in [0, 1], and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))[start : start + count]
    y = labels[order].astype("int32")
    return (images[order] / 16).astype("float32"), np.eye(10, dtype="float32")[y] if one_hot else y


def mlp(*hidden: int, activation: str = "relu", seed: int = 1) -> keras.Sequential:
    """A classifier of digits with its initial weights fixed by `seed`."""
    seeds = iter(range(seed * 100, seed * 100 + 100))
    layers: list[Any] = [keras.Input((64,))]
    for units in hidden or (32,):
        start = keras.initializers.GlorotUniform(seed=next(seeds))
        layers.append(keras.layers.Dense(units, activation=activation, kernel_initializer=start))
    start = keras.initializers.GlorotUniform(seed=next(seeds))
    layers.append(keras.layers.Dense(10, activation="softmax", kernel_initializer=start))
    return keras.Sequential(layers)


def line() -> keras.Sequential:
    """y = w x with w = 0 at first: its losses can be worked out by hand."""
    return keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )


def points(targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points at x = 1 with the given targets."""
    y = np.asarray(targets, "float32").reshape(-1, 1)
    return np.ones_like(y), y


def tokens(count: int = 53, length: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of tokens, padded with zeros to very different lengths, and a target a token."""
    generator = np.random.default_rng(1)
    x = generator.integers(1, 20, (count, length))
    x[np.arange(length) >= generator.integers(1, length + 1, (count, 1))] = 0
    return x, generator.standard_normal((count, length, 1)).astype("float32")


def alone() -> Runtime:
    """A runtime of one process, for the reference on the same machine."""
    return Runtime(SingleCommunicator())


class Weights(keras.callbacks.Callback):
    """Keeps the weights at the end of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[np.ndarray]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append([w.copy() for w in self.model.get_weights()])


class StopAfter(keras.callbacks.Callback):
    """Another callback that ends training."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self._epoch = epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = epoch >= self._epoch


class Counting:
    """Stands before a communicator and counts the calls."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.calls: list[str] = []
        self.buckets: list[int] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._communicator, name)
        if not callable(value):
            return value

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name == "sum_gradients":
                self.buckets.append(len(args[0]))
            return value(*args, **kwargs)

        return counted


def bits(arrays: list[np.ndarray]) -> list[str]:
    """One digest an array: equal where all bytes are, and short where a failed test shows it."""
    return [weights.digest(array) for array in arrays]


def worst(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest absolute difference."""
    assert [a.shape for a in ours] == [a.shape for a in theirs]
    return max(
        (float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True) if a.size),
        default=0.0,
    )
