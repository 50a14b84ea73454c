"""A tiny model, its data, and a model of nothing but what callbacks touch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

X = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")
Y = (X.sum(1, keepdims=True) > 0).astype("float32")


def make(**options: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile(
        options.pop("optimizer", None) or keras.optimizers.Adam(0.1),
        options.pop("loss", "mse"),
        metrics=options.pop("metrics", ["accuracy"]),
        run_eagerly=options.pop("run_eagerly", True),
        **options,
    )
    return model


def fit(model: keras.Model, *callbacks: Any, epochs: int = 1, **options: Any) -> Any:
    options = {"batch_size": 4, "verbose": 0, "validation_data": (X[:5], Y[:5]), **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


class FakeModel:
    """Its weights are the number of the epoch they are of."""

    def __init__(self) -> None:
        self.stop_training = False
        self.epoch = -1
        self.optimizer = SimpleNamespace(learning_rate=np.float32(0.1), iterations=np.array(0))
        self.optimizer.iterations = SimpleNamespace(numpy=lambda: 0)

    def get_weights(self) -> list[np.ndarray]:
        return [np.array([self.epoch])]

    def set_weights(self, weights: list[np.ndarray]) -> None:
        self.epoch = int(weights[0][0])


class Script(keras.callbacks.Callback):
    """Writes given values into the logs, as a metric of that name would."""

    def __init__(self, values: list[float], name: str = "val_loss") -> None:
        super().__init__()
        self.values, self.name = values, name

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        assert logs is not None
        logs[self.name] = self.values[epoch]
