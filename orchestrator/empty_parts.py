"""Steps on parts that may be empty: a rank without samples takes part and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

Step = Callable[[Any], Any]


def batch_size(data: Any) -> tuple[Any, bool]:
    """The number of samples in a batch (scalar int32), and whether it is known while tracing."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    first = next(leaf for leaf in tf.nest.flatten(x) if leaf is not None)
    static = first.shape[0]
    return (tf.shape(first)[0] if static is None else static), bool(static)


def run(step: Step, data: Any, state: Sequence[Any]) -> Any:
    """Runs a step, on one sample of zeros where there is none.

    So that all ranks make the same collectives, and no layer or loss meets an empty batch.

    Args:
        step: A model's `train_step` or `test_step`.
        data: This rank's batch, perhaps of no samples.
        state: The variables that a step without samples must leave as they are.

    Returns:
        What the step returns.
    """
    count, known = batch_size(data)
    if known or not _is_dense(data):
        return step(data)
    before = [tf.convert_to_tensor(v) for v in state]
    stand_in = tf.cond(
        count > 0, lambda: _identity(data), lambda: tf.nest.map_structure(_one_zero, data)
    )
    logs = step(stand_in)
    tf.cond(count > 0, tf.no_op, lambda: _restore(state, before))
    return logs


def _is_dense(data: Any) -> bool:
    return all(
        leaf is None
        or (tf.is_tensor(leaf) and not isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)))
        for leaf in tf.nest.flatten(data)
    )


def _identity(data: Any) -> Any:
    return tf.nest.map_structure(lambda leaf: None if leaf is None else tf.identity(leaf), data)


def _one_zero(leaf: Any) -> Any:
    if leaf is None:
        return None
    return tf.zeros(tf.concat([[1], tf.shape(leaf)[1:]], 0), leaf.dtype)


def _restore(variables: Sequence[Any], values: list[tf.Tensor]) -> tf.Operation:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return tf.no_op()
