"""The seed tutorial's callbacks on scikit-learn's digits, with only the import changed.

One process: `python -m tests.tutorial FOLDER`; many: `horovodrun -np 2 python -m tests.tutorial
FOLDER`. Rank 0 prints what happened as one line, `FACTS {...}`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import orchestrator

# The tutorial has `from tensorflow.keras.callbacks import ...` here.
from orchestrator.callbacks import EarlyStopping, ModelCheckpoint, ReduceLROnPlateau
from orchestrator.runtime import Runtime
from orchestrator.weights import digest

EPOCHS, BATCH_SIZE = 100, 32


def checkpoint_snippet() -> list[Any]:
    checkpoint = ModelCheckpoint(
        "best_model_epoch_{epoch:02d}_val_loss_{val_loss:.2f}.keras",
        monitor="val_loss",
        save_best_only=True,
        mode="min",
        verbose=1,
    )
    return [checkpoint]


def stopping_snippet() -> list[Any]:
    early_stopping = EarlyStopping(
        monitor="val_loss",
        min_delta=0.001,
        patience=5,
        mode="min",
        restore_best_weights=True,
        verbose=1,
    )
    return [early_stopping]


def plateau_snippet() -> list[Any]:
    reduce_lr = ReduceLROnPlateau(
        monitor="val_loss", factor=0.2, patience=5, min_lr=1e-5, mode="min", verbose=1
    )
    return [reduce_lr]


def combination() -> list[Any]:
    checkpoint = ModelCheckpoint(
        "best_model.keras", monitor="val_loss", save_best_only=True, mode="min"
    )
    early_stopping = EarlyStopping(
        monitor="val_loss", patience=15, restore_best_weights=True, mode="min"
    )
    reduce_lr = ReduceLROnPlateau(
        monitor="val_loss", factor=0.1, patience=7, min_lr=1e-5, mode="min"
    )
    return [checkpoint, early_stopping, reduce_lr]


SNIPPETS = {
    "checkpoint": (checkpoint_snippet, 12),
    "stopping": (stopping_snippet, 60),
    "plateau": (plateau_snippet, 40),
    "combination": (combination, EPOCHS),
}


class WeightsByEpoch(keras.callbacks.Callback):
    """A digest of all weights at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.digests: list[str] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.digests.append(weights_of(self.model))


def weights_of(model: keras.Model) -> str:
    return digest(np.concatenate([w.ravel() for w in model.get_weights()]))


def digits() -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16.0).astype("float32"), labels.astype("int32")
    order = np.random.default_rng(0).permutation(len(images))
    held_out, rest = order[:359], order[359:]
    return (images[rest], labels[rest]), (images[held_out], labels[held_out])


def build() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(48, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def train(runtime: Runtime, snippet: str) -> dict[str, Any]:
    """Trains with one snippet in the working directory; what happened, on this rank."""
    keras.utils.set_random_seed(runtime.seed)
    make, epochs = SNIPPETS[snippet]
    training, validation = digits()
    model = build()
    model.compile(
        optimizer=runtime.distribute(keras.optimizers.Adam(1e-2)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    runtime.broadcast(model)
    by_epoch = WeightsByEpoch()
    history = model.fit(
        runtime.shard(training, batch_size=BATCH_SIZE, shuffle=True),
        validation_data=runtime.shard(validation, batch_size=BATCH_SIZE),
        epochs=epochs,
        verbose=0,
        callbacks=[*make(), by_epoch],
    )
    return {
        "history": {k: [float(v) for v in values] for k, values in history.history.items()},
        "by_epoch": by_epoch.digests,
        "weights": weights_of(model),
        "learning_rate": float(model.optimizer.learning_rate.numpy()),
    }


def of_file(path: str) -> dict[str, Any]:
    """What plain Keras finds in a saved file."""
    model = keras.models.load_model(path)
    _, validation = digits()
    loss, accuracy = model.evaluate(*validation, batch_size=BATCH_SIZE, verbose=0)
    return {
        "val_loss": loss,
        "val_accuracy": accuracy,
        "weights": weights_of(model),
        "optimizer": type(model.optimizer).__qualname__,
    }


def run(runtime: Runtime, snippet: str) -> dict[str, Any]:
    """All that the tests look at, the same on every rank."""
    facts = train(runtime, snippet)
    facts["weights_by_rank"] = runtime.communicator.allgather_object(facts["weights"])
    saved = [name for name in sorted(os.listdir()) if name.endswith(".keras")]
    mine = {name: of_file(name) for name in saved} if runtime.is_root else {}
    facts["files"] = runtime.communicator.broadcast_object(mine)
    facts["left"] = sorted(os.listdir())
    return facts


def main(folder: str) -> None:
    runtime = orchestrator.init(seed=3)
    os.chdir(folder)
    facts = run(runtime, "combination")
    runtime.say("FACTS " + json.dumps({**facts, "size": runtime.size}))


if __name__ == "__main__":
    main(sys.argv[1])
