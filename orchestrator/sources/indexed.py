"""A rank's part of each batch of samples that are read by index, in order or shuffled."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.sources.base import Source, part
from orchestrator.sources.position import Position


class Orders:
    """An order for each pass, the same on all ranks.

    Args:
        seed: Not negative; gives all the orders.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, length: int, number: int) -> np.ndarray:
        """The numbers from 0 to `length - 1`, int64, in the order of pass `number`, from 0."""
        return np.random.default_rng([self._seed, number]).permutation(length)


def own_samples(
    source: Source,
    samples: range,
    batch_size: int,
    orders: Orders | None,
    rank: int,
    size: int,
    position: Position | None = None,
) -> tf.data.Dataset:
    """A rank's part of each global batch.

    Args:
        source: Where the samples are.
        samples: Which of them there are to give, by index.
        batch_size: The global batch size.
        orders: Gives each pass its order; `None` for the samples' own.
        rank: Whose part.
        size: Of how many ranks.
        position: Asked at the beginning of each pass which it is and where it begins; by default
            passes are counted from 0 and are whole.

    Returns:
        A dataset of as many elements as there are global batches.
    """
    length = len(samples)
    batches = -(-length // batch_size)
    position = position or Position()

    def begin() -> tuple[np.ndarray, np.int64]:
        number, first = position.begin(batches)
        order = np.zeros(0, np.int64) if orders is None else orders(length, number)
        return order, np.int64(first)

    def opened() -> tuple[tf.Tensor, tf.Tensor]:
        order, first = tf.numpy_function(begin, [], [tf.int64, tf.int64])
        return tf.ensure_shape(order, [None]), tf.ensure_shape(first, [])

    def indices(state: Any, number: tf.Tensor) -> tuple[Any, tf.Tensor]:
        order, first = state = tf.cond(number == 0, opened, lambda: state)
        start = number * batch_size
        offset, count = part(tf.minimum(length - start, batch_size), rank, size)
        count = tf.where(number < first, tf.zeros_like(count), count)
        own = tf.range(start + offset, start + offset + count)
        return state, own if orders is None else tf.gather(order, own)

    def rows(own: tf.Tensor) -> Any:
        return source.rows(own + samples.start)

    none = (tf.zeros([0], tf.int64), tf.zeros([], tf.int64))
    dataset = tf.data.Dataset.range(batches).scan(none, indices)
    return dataset.map(rows, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
