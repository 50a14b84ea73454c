"""Statistics that layers keep of the data they saw, such as BatchNormalization's, across ranks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator import gradients
from orchestrator.communicators.base import Communicator
from orchestrator.times import Times


def moving(model: keras.Model) -> list[Any]:
    """The variables that a model's layers, but frozen ones, update as they see data."""
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():
        if layer.trainable:
            for variable in layer._non_trainable_variables:
                if tf.as_dtype(variable.dtype).is_floating:
                    found[id(variable)] = variable
    return list(found.values())


class MovingStatistics:
    """Brings a model's moving statistics together: each rank's own until then.

    Attributes:
        stale: Whether training steps were made since the last `merge`; the same on all ranks.
    """

    def __init__(self, model: keras.Model, communicator: Communicator) -> None:
        self._model = model
        self._communicator = communicator
        self._seen = tf.Variable(tf.zeros([], tf.int64), trainable=False)
        self.stale = False

    def saw(self, count: Any) -> None:
        """Counts this rank's samples of one training step; called while it is traced."""
        self._seen.assign_add(tf.cast(count, tf.int64))

    def merge(self) -> None:
        """Gives every rank the mean, weighted by the samples seen since the last time.

        Called by all ranks. One allreduce where there are statistics and training steps were
        made, else nothing. A variance becomes the mean of the ranks' variances.
        """
        merged = self.merged()
        for variable, value in merged:
            variable.assign(value)
        if merged:
            self._seen.assign(0)
        self.stale = False

    def merged(self) -> list[tuple[Any, np.ndarray]]:
        """What `merge` would give each variable, which stays as it is; communicates alike."""
        variables = moving(self._model) if self.stale else []
        if not variables:
            return []
        seen = float(self._seen.numpy())
        # A rank that saw nothing sends zeros, also where its own have become NaN.
        own = [v.numpy().astype(np.float64).reshape(-1) for v in variables]
        own = [values * seen if seen else np.zeros_like(values) for values in own]
        flat = np.concatenate([*own, [seen]])
        *sums, total = np.split(
            self._communicator.allreduce(flat), np.cumsum([len(values) for values in own])
        )
        if not total[0] > 0:
            return []
        return [
            (variable, (values / total[0]).reshape(variable.shape).astype(variable.dtype))
            for variable, values in zip(variables, sums, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """What this rank's statistics are, and how much they weigh in the next `merge`."""
        values = [v.numpy() for v in moving(self._model)]
        return {"values": values, "seen": int(self._seen.numpy()), "stale": self.stale}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a state of this rank, of a model of the same layers."""
        for variable, value in zip(moving(self._model), state["values"], strict=True):
            variable.assign(value)
        self._seen.assign(state["seen"])
        self.stale = state["stale"]


def synchronize(model: keras.Model, communicator: Communicator, times: Times) -> None:
    """Makes `BatchNormalization(synchronized=True)` normalise by the global batch.

    Keras's option knows only the replicas of one process. Two small collectives a layer and step
    follow, one of the forward and one of the backward pass. Does not communicate itself.
    """
    for index, layer in enumerate(model._flatten_layers()):
        if is_synchronized(layer) and "_moments" not in vars(layer):
            layer._moments = _GlobalMoments(layer, communicator, times, f"moments.{index}")


def is_synchronized(layer: Any) -> bool:
    """Whether a layer asks for the statistics of the global batch."""
    return isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized


class _GlobalMoments:
    """Stands in for one layer's `_moments`: mean and variance over all ranks' samples."""

    def __init__(self, layer: Any, communicator: Communicator, times: Times, name: str) -> None:
        self._own = layer._moments
        self._axes = layer._reduction_axes
        self._communicator = communicator
        self._times = times
        self._name = name

    def __call__(self, inputs: tf.Tensor, mask: Any) -> tuple[tf.Tensor, tf.Tensor]:
        samples = gradients.sample_count()
        if samples is None:  # not a training step of ours
            return self._own(inputs, mask)
        count, mean, variance = (tf.cast(t, tf.float64) for t in self._local(inputs, mask))
        # A part without samples is stood in for by one sample, which does not count.
        count *= tf.cast(tf.cast(samples, tf.int32) > 0, tf.float64)
        sums = tf.stack([count, count * mean, count * (variance + tf.square(mean))])
        count, total, squares = tf.unstack(self._over_ranks(sums))
        mean = tf.math.divide_no_nan(total, count)
        variance = tf.maximum(tf.math.divide_no_nan(squares, count) - tf.square(mean), 0)
        return tf.cast(mean, inputs.dtype), tf.cast(variance, inputs.dtype)

    def _local(self, inputs: tf.Tensor, mask: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """This rank's valid entries, their mean and variance, for each channel."""
        axes = self._axes
        if mask is None:
            mean, variance = tf.nn.moments(inputs, axes)
            entries = tf.size(inputs) / tf.size(mean)
            return tf.fill(tf.shape(mean), tf.cast(entries, inputs.dtype)), mean, variance
        valid = tf.cast(tf.cast(mask, tf.bool)[..., tf.newaxis], inputs.dtype)
        valid = tf.broadcast_to(valid, tf.shape(inputs))
        divisor = tf.maximum(tf.reduce_sum(valid, axes, keepdims=True), 1)
        mean = tf.reduce_sum(valid * inputs, axes, keepdims=True) / divisor
        variance = tf.reduce_sum(valid * tf.square(inputs - mean) / divisor, axes)
        return tf.reduce_sum(valid, axes), tf.reshape(mean, tf.shape(variance)), variance

    def _over_ranks(self, local: tf.Tensor) -> tf.Tensor:
        """The sum, whose gradient is that of all ranks' losses.

        A rank's gradients are later weighted by what is behind them, n of N: what other ranks
        add here has to be so weighted before, by their n, and this rank's divided out.
        """

        @tf.custom_gradient
        def total(value: tf.Tensor) -> Any:
            def backward(upstream: tf.Tensor) -> tf.Tensor:
                said = gradients.behind()
                count = tf.cast(said.count, tf.float64)
                weight = tf.cast(count > 0, tf.float64) if said.summed else count
                weighted = tf.math.multiply_no_nan(upstream, weight)
                whole = self._sum(weighted, f"{self._name}.backward")
                return tf.math.divide_no_nan(whole, weight)

            return self._sum(value, f"{self._name}.forward"), backward

        return total(local)

    def _sum(self, value: tf.Tensor, name: str) -> tf.Tensor:
        sums = self._communicator.sum_gradients
        return self._times.reducing([value], lambda own: sums([own], name))[0][0]
