"""The example to copy: scikit-learn's handwritten digits, plain Keras and tf.data."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits


def data(
    global_batch_size: int, seed: int, validation: float = 0.2
) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Training and validation datasets, batched to the global batch size.

    Called alike on every rank; the orchestrator then gives each rank its part of every batch.
    1,797 real images of 8 x 8 pixels, float32 in [0, 1], with labels 0 to 9.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32").reshape(-1, 8, 8, 1)
    labels = labels.astype("int32")
    order = np.random.default_rng(0).permutation(len(images))
    held_out = int(len(images) * validation)
    test, train = order[:held_out], order[held_out:]
    training = tf.data.Dataset.from_tensor_slices((images[train], labels[train]))
    training = training.shuffle(len(train), seed=seed).batch(global_batch_size)
    testing = tf.data.Dataset.from_tensor_slices((images[test], labels[test]))
    return training, testing.batch(global_batch_size)


def model(learning_rate: float = 1e-3) -> keras.Model:
    """A small convolutional network, compiled."""
    net = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    net.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return net
