"""Two ranks that are threads, with parts of their own and a model each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tests.distributed import threads


def model(runtime: Any, optimizer: Any = None, **options: Any) -> keras.Model:
    """y = w x + b, from fixed weights."""
    built = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones", name="dense")]
    )
    optimizer = runtime.distribute(optimizer or keras.optimizers.SGD(0.01))
    # Optimizers are numbered in the order they are distributed: processes agree on it, threads not.
    optimizer.apply.reduction = optimizer.apply.reduction._replace(name="ranks")
    built.compile(optimizer, "mse", metrics=["mae"], **options)
    runtime.broadcast(built)
    return built


def data(samples: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(samples, 2)).astype("float32")
    return x, (x @ np.array([[1.0], [-2.0]], "float32")).astype("float32")


def fit(runtime: Any, callbacks: list[Any], epochs: int = 2, **options: Any) -> Any:
    """Four steps an epoch; the ranks' halves of the validation are far apart."""
    own = options.pop("model", None) or model(runtime, options.pop("optimizer", None))
    train = options.pop("train", None) or data()
    x, y = data(8, 1)
    val = (x, y + np.arange(8, dtype="float32")[:, None])
    return own.fit(
        runtime.shard(train, batch_size=4),
        validation_data=runtime.shard(val, batch_size=4),
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
        **options,
    )


def run(function: Callable[[Any], Any], size: int = 2) -> list[Any]:
    """What `function(runtime)` gives on each rank."""
    return threads.run_with_runtime(size, function)
