"""The same training written in four ways: a loop by hand, `fit` by hand, `fit` on our runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import orchestrator
from orchestrator import callbacks

GLOBAL_BATCH = 64
EPOCHS = 10**6
COMPILE: dict[str, Any] = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}
Step = Callable[[], bool]


def build(kind: str, cls: type[keras.Model] = keras.Model) -> keras.Model:
    """The digits example's network (29 thousand weights), or dense layers (4.2 million)."""
    layers = keras.layers
    image = x = keras.Input((8, 8, 1))
    if kind == "small":
        x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
        x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
        x = layers.Dropout(0.3)(layers.Flatten()(x))
    else:
        x = layers.Flatten()(x)
        for width in (1024, 1408, 1408, 512):
            x = layers.Dense(width, activation="relu")(x)
    return cls(image, layers.Dense(10, activation="softmax")(x))


def digits(steps: int, rank: int, size: int) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """An epoch of global batches, and the same samples cut for this rank by hand."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.arange(steps * GLOBAL_BATCH) % len(images)
    images = (images / 16.0).astype("float32").reshape(-1, 8, 8, 1)[chosen]
    labels = labels.astype("int32")[chosen]
    own = GLOBAL_BATCH // size
    mine = np.arange(len(images)).reshape(steps, size, own)[:, rank].reshape(-1)
    # With autotuning, TensorFlow 2.21 may take seconds to delete an iterator, whoever's it is.
    options = tf.data.Options()
    options.autotune.enabled = False
    everything = tf.data.Dataset.from_tensor_slices((images, labels)).batch(GLOBAL_BATCH)
    part = tf.data.Dataset.from_tensor_slices((images[mine], labels[mine])).batch(own).prefetch(2)
    return everything.with_options(options), part.with_options(options)


class StepHook(keras.callbacks.Callback):
    """Asks before each step whether to go on; leaves `fit`'s asynchronous batch ends alone."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._step = step

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not self._step():
            self.model.stop_training = True


class FirstMark(callbacks.GlobalMetrics):
    """Notes when an epoch's steps are over and the work at its end begins."""

    begin = 0.0

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.begin = time.perf_counter()
        super().on_epoch_end(epoch, logs)


class LastMark(keras.callbacks.Callback):
    """Notes how long the callbacks' work at the end of each epoch took."""

    def __init__(self, first: FirstMark, times: list[float]) -> None:
        super().__init__()
        self._first, self._times = first, times

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._times.append(time.perf_counter() - self._first.begin)


def our_fit(
    kind: str, runtime: orchestrator.Runtime, data: tf.data.Dataset, step: Step, ends: list[float]
) -> Callable[[], None]:
    """What our README tells a user to write; `ends` gets the times of the epochs' ends."""
    model = build(kind)
    model.compile(runtime.distribute(keras.optimizers.Adam()), **COMPILE)
    runtime.broadcast(model)
    part = runtime.shard(data)
    first = FirstMark()
    ours = [
        first,
        callbacks.EarlyStopping(monitor="loss", patience=EPOCHS, restore_best_weights=True),
        callbacks.ReduceLROnPlateau(monitor="loss", patience=EPOCHS),
        LastMark(first, ends),
        StepHook(step),
    ]
    return lambda: model.fit(part, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=ours)


class HandMadeModel(keras.Model):
    """Keras's guide to `train_step`, with Horovod's reduction in it."""

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            prediction = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=prediction)
        gradients = tape.gradient(loss, self.trainable_variables)
        gradients = hvd.grouped_allreduce(gradients, op=hvd.Average)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, prediction)
        return {metric.name: metric.result() for metric in self.metrics}


def fit_by_hand(kind: str, part: tf.data.Dataset, step: Step) -> Callable[[], None]:
    """`fit` with nothing of ours."""
    model = build(kind, HandMadeModel)
    model.compile(keras.optimizers.Adam(), **COMPILE)
    hvd.broadcast_variables([v.value for v in model.trainable_variables], 0)
    return lambda: model.fit(
        part, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[StepHook(step)]
    )


def loop_by_hand(kind: str, part: tf.data.Dataset, step: Step) -> Callable[[], None]:
    """Keras's guide to a training loop, with Horovod's reduction in it and nothing else."""
    model = build(kind)
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    loss_function = keras.losses.SparseCategoricalCrossentropy()
    mean, accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()
    hvd.broadcast_variables([v.value for v in model.trainable_variables], 0)

    @tf.function(reduce_retracing=True)
    def train_step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
            loss = loss_function(y, prediction)
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients = hvd.grouped_allreduce(gradients, op=hvd.Average)
        optimizer.apply(gradients, model.trainable_variables)
        mean.update_state(loss)
        accuracy.update_state(y, prediction)

    def loop() -> None:
        while True:
            mean.reset_state()
            accuracy.reset_state()
            for x, y in part:
                if not step():
                    return
                train_step(x, y)
            _ = float(mean.result()), float(accuracy.result())

    return loop
