"""A rank's part of each batch of samples that are read by index, in order or shuffled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.sources.base import Source, part


class Orders:
    """A new order each time it is called: the same on all ranks that call it as often.

    Args:
        seed: Not negative; gives all the orders.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._calls = seed, itertools.count()

    def __call__(self, length: int) -> np.ndarray:
        """The numbers from 0 to `length - 1`, int64, in the next order."""
        return np.random.default_rng([self._seed, next(self._calls)]).permutation(length)


def own_samples(
    source: Source,
    samples: range,
    batch_size: int,
    orders: Orders | None,
    rank: int,
    size: int,
) -> tf.data.Dataset:
    """A rank's part of each global batch.

    Args:
        source: Where the samples are.
        samples: Which of them there are to give, by index.
        batch_size: The global batch size.
        orders: Called at the beginning of each pass for its order; `None` for the samples' own.
        rank: Whose part.
        size: Of how many ranks.

    Returns:
        A dataset of as many elements as there are global batches.
    """
    length = len(samples)

    def own(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        first = number * batch_size
        begin, count = part(tf.minimum(length - first, batch_size), rank, size)
        return first + begin, first + begin + count

    def rows(indices: tf.Tensor) -> Any:
        return source.rows(indices + samples.start)

    numbers = tf.data.Dataset.range(-(-length // batch_size))
    if orders is None:
        indices = numbers.map(lambda number: tf.range(*own(number)))
    else:
        indices = numbers.scan(tf.zeros([0], tf.int64), _shuffled(orders, length, own))
    return indices.map(rows, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _shuffled(orders: Orders, length: int, own: Callable[[Any], tuple[Any, Any]]) -> Callable:
    """What `Dataset.scan` calls with the pass's order so far and the number of the batch."""

    def new_order() -> tf.Tensor:
        order = tf.numpy_function(lambda: orders(length), [], tf.int64)
        return tf.ensure_shape(order, [None])

    def indices(order: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        order = tf.cond(number == 0, new_order, lambda: order)
        begin, end = own(number)
        return order, order[begin:end]

    return indices
