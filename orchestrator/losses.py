"""What a loss was divided by: the number by which a rank's gradients count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from orchestrator import gradients
from orchestrator.config import SettingError
from orchestrator.gradients import Behind

_SUMS = ("sum", "none", None)


Then = Callable[[tf.Tensor, Behind], tf.Tensor]


def count_by_divisor(model: keras.Model, then: Then | None = None) -> None:
    """Has each loss of `model` say what it was divided by; does not communicate itself.

    Keras divides by samples, or by the valid entries of a mask, or by the sum of the sample
    weights (`reduction="mean_with_sample_weight"`), or by nothing (`reduction="sum"`). Wraps
    `compute_loss` on the instance, which `train_step` calls between its forward and backward pass.

    Args:
        model: Compiled or not yet.
        then: Called with the loss and what it was divided by; gives the loss to use instead.
    """
    own = model.compute_loss

    def compute_loss(
        x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **options: Any
    ) -> Any:
        _weigh_outputs(model)
        loss = own(x, y, y_pred, sample_weight, **options)
        count = gradients.sample_count()
        if count is None:
            return loss
        said = _behind(model, y_pred, sample_weight, count)
        gradients.correct(said)
        return then(loss, said) if then else loss

    model.compute_loss = compute_loss


def _behind(model: keras.Model, y_pred: Any, sample_weight: Any, count: Any) -> Behind:
    compiled = getattr(model, "_compile_loss", None)
    losses = [entry.loss for entry in getattr(compiled, "_flat_losses", None) or ()]
    reductions = {loss.reduction for loss in losses}
    outputs = tf.nest.flatten(y_pred)
    masks = [getattr(output, "_keras_mask", None) for output in outputs]
    by_weight = "mean_with_sample_weight" in reductions and sample_weight is not None
    if reductions & {*_SUMS}:
        return _summed(model, reductions, count)
    if not by_weight and all(mask is None for mask in masks):
        return Behind(count)
    if len(reductions) > 1 or (len(outputs) > 1 and (by_weight or not _one_mask(masks))):
        raise SettingError(
            "On many ranks the losses of a model must be divided by one and the same number, and "
            f"this model's are not: reductions {sorted(map(str, reductions))}, "
            f"{sum(mask is not None for mask in masks)} of {len(outputs)} outputs masked. Use "
            "reduction='sum_over_batch_size' (Keras's default), with a mask on all outputs or none."
        )
    divisor = tf.reduce_sum(_entries(masks[0], sample_weight if by_weight else None))
    return Behind(tf.where(tf.cast(count, tf.int32) > 0, divisor, 0.0))


def _summed(model: keras.Model, reductions: set[Any], count: Any) -> Behind:
    if not reductions <= {*_SUMS} or model.losses:
        raise SettingError(
            "A loss with reduction='sum' is supported on many ranks only where nothing is "
            f"averaged beside it; this model has reductions {sorted(map(str, reductions))} and "
            f"{len(model.losses)} regularizer(s) or added loss(es). Use 'sum_over_batch_size' "
            "(Keras's default) and multiply the learning rate by the global batch size."
        )
    return Behind(count, summed=True)


def _one_mask(masks: list[Any]) -> bool:
    return all(mask is masks[0] for mask in masks)


def _entries(mask: Any, sample_weight: Any) -> tf.Tensor:
    """Valid entries as ones, or their weights, as Keras multiplies a mask into sample weights."""
    if sample_weight is None:
        return tf.cast(mask, tf.float32)
    weight = tf.cast(tf.nest.flatten(sample_weight)[0], tf.float32)
    if mask is None:
        return weight
    return tf.cast(mask, tf.float32) * weight


def _weigh_outputs(model: keras.Model) -> None:
    """Has Keras's trackers of several outputs' losses count by samples.

    Where the batch size is not known while tracing, as of every part of a global batch, Keras
    counts batches, and a part of 21 samples would weigh as much as one of 22.
    """
    for metric in getattr(getattr(model, "_compile_loss", None), "metrics", ()):
        if "update_state" not in vars(metric):
            metric.update_state = _by_samples(metric.update_state)


def _by_samples(update_state: Any) -> Any:
    def update(values: Any, sample_weight: Any = None) -> Any:
        weight = gradients.sample_count() if sample_weight is None else sample_weight
        return update_state(values, sample_weight=weight)

    return update
