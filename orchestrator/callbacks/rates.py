"""The learning rates of a model: of its optimizer, or of each in a `MultiOptimizer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


def optimizers(model: keras.Model) -> Iterator[tuple[str, Any]]:
    """The optimizers that have a rate, by the names under which Keras logs it."""
    optimizer: Any = model.optimizer
    if hasattr(optimizer, "optimizers"):
        for inner in optimizer.optimizers:
            yield f"learning_rate_{inner.name}", inner
    else:
        yield "learning_rate", optimizer


def learning_rate(optimizer: Any) -> float:
    """The current learning rate, of a variable or of a schedule."""
    rate = optimizer.learning_rate
    return float((rate.value if isinstance(rate, keras.Variable) else rate).numpy())


def learning_rates(model: keras.Model) -> dict[str, float]:
    """All of them, by the names under which Keras logs them."""
    return {name: learning_rate(optimizer) for name, optimizer in optimizers(model)}


def set_learning_rate(optimizer: Any, rate: float, momentum_correction: bool) -> None:
    """Sets a rate.

    Args:
        optimizer: With a rate that can be set.
        rate: The new one.
        momentum_correction: Whether what has gathered in momentum is scaled along: Keras's SGD
            and RMSprop keep it multiplied by the rates of the steps before (Goyal et al. 2017,
            arXiv:1706.02677, remark 2).

    Raises:
        TypeError: The optimizer has a `LearningRateSchedule`.
    """
    before = learning_rate(optimizer)
    optimizer.learning_rate = rate
    velocities = _velocities(optimizer) if momentum_correction else []
    if velocities and before and rate != before:
        _scale([getattr(v, "value", v) for v in velocities], tf.constant(rate / before))


def _velocities(optimizer: Any) -> list[Any]:
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # under loss scaling
    if not isinstance(inner, keras.optimizers.SGD | keras.optimizers.RMSprop):
        return []  # others keep averages of gradients, without the rate
    return list(getattr(inner, "momentums", None) or getattr(inner, "_momentums", None) or [])


@tf.function(reduce_retracing=True)
def _scale(velocities: list[Any], ratio: tf.Tensor) -> None:
    for velocity in velocities:
        velocity.assign(velocity * tf.cast(ratio, velocity.dtype))
