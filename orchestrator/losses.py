"""What a loss was divided by: the number by which a rank's gradients count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator import gradients
from orchestrator.config import SettingError
from orchestrator.gradients import Behind

_SUMS = ("sum", "none", None)
_ATTRIBUTE = "_orchestrator_batch_losses"

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


class BatchLosses:
    """The losses of single batches, where they are not means over samples.

    Keras reports their mean over batches, weighted by samples. Of such a loss a rank knows only
    its own part until the ranks meet, so that each batch's parts have to be kept till then.
    """

    def __init__(self, model: keras.Model, size: int) -> None:
        self._size = size
        self._rows: list[np.ndarray] = []
        # Past Keras's tracking, so that what is saved or cloned does not know of it.
        object.__setattr__(model, _ATTRIBUTE, self)
        self._reset = model.reset_metrics
        model.reset_metrics = self._forget

    def keep(self, loss: tf.Tensor, said: Behind) -> tf.Tensor:
        """Adds to the step being traced that this rank's part of its loss is kept."""
        samples = gradients.sample_count()
        if said.summed:
            # Of the divisor, 1, each rank has its share, also without samples.
            present = tf.cast(tf.cast(samples, tf.int32) > 0, loss.dtype)
            parts = (tf.math.multiply_no_nan(loss, present), 1 / self._size, samples)
        elif said.count is samples:
            return loss
        else:
            count = tf.cast(said.count, loss.dtype)
            parts = (tf.math.multiply_no_nan(loss, count), count, samples)
        row = tf.stack([tf.cast(part, tf.float64) for part in parts])
        tf.numpy_function(self._rows.append, [row], [])
        return loss

    def _forget(self) -> None:
        self._rows.clear()
        self._reset()

    def restore(self, rows: np.ndarray) -> None:
        """Takes up what had been kept before."""
        self._rows[:] = list(rows)

    def rows(self) -> np.ndarray:
        """Since metrics were reset, a row a batch: its loss's numerator, divisor, and samples."""
        return np.array(self._rows, np.float64).reshape(-1, 3)


def batch_losses(model: keras.Model) -> np.ndarray:
    """This rank's parts of the batches' losses, (batches, 3) float64; none where not kept."""
    kept = getattr(model, _ATTRIBUTE, None)
    return np.zeros((0, 3)) if kept is None else kept.rows()


def restore(model: keras.Model, rows: np.ndarray) -> None:
    """Takes up what `batch_losses` gave in an earlier run."""
    kept = getattr(model, _ATTRIBUTE, None)
    if kept is not None:
        kept.restore(rows)


def mean_of(rows: np.ndarray) -> float:
    """The loss Keras reports, from the sum of all ranks' rows; 0 without samples, as there."""
    losses = np.divide(rows[:, 0], rows[:, 1], out=np.zeros(len(rows)), where=rows[:, 1] != 0)
    samples = rows[:, 2].sum()
    return float(losses @ rows[:, 2] / samples) if samples else 0.0
