"""Gradients reduced across ranks inside a Keras optimizer, each rank weighted by its samples."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from orchestrator.communicators.base import Communicator

_traced = threading.local()


@contextlib.contextmanager
def samples(count: tf.Tensor | int) -> Iterator[None]:
    """Says how many samples stand behind the gradients applied inside; does not communicate.

    `Runtime.broadcast` puts it around a model's `train_step`; a training loop of your own puts it
    around `optimizer.apply_gradients`.

    Args:
        count: Scalar, this rank's samples in this step; 0 where it has none.
    """
    previous = getattr(_traced, "samples", None)
    _traced.samples = count
    try:
        yield
    finally:
        _traced.samples = previous


class ReducedApply:
    """Stands in for one optimizer's `apply`: gradients first become the global batch's.

    The optimizer keeps its class, its config and its variables, so files it is saved in load
    where this package is not installed. The result on every rank is

        sum over ranks of (samples * gradient) / sum over ranks of (samples)

    which is the gradient of the mean loss over the global batch. Counts and gradients travel
    together, in one grouped collective a bucket.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, communicator: Communicator, buckets: int
    ) -> None:
        self._apply = optimizer.apply
        self._communicator = communicator
        self._buckets = buckets

    def __call__(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Reduces `grads` (dense or `IndexedSlices`, `None` where there is none), then applies."""
        grads = list(grads)
        present = [i for i, grad in enumerate(grads) if grad is not None]
        # The backward pass yields the last layers' gradients first.
        order = list(reversed(present))
        reduced = self._reduce([tf.convert_to_tensor(grads[i]) for i in order])
        for i, grad in zip(order, reduced, strict=True):
            grads[i] = grad
        self._apply(grads, trainable_variables)

    def _reduce(self, grads: list[tf.Tensor]) -> list[tf.Tensor]:
        if not grads:
            return grads
        count = tf.cast(_sample_count(), tf.float32)
        # A rank without samples sends zeros, also where its mean over nothing was NaN.
        weighted = [tf.math.multiply_no_nan(g, tf.cast(count, g.dtype)) for g in grads]
        buckets = [[*bucket, count] for bucket in cut(weighted, self._buckets)]
        result: list[tf.Tensor] = []
        for *sums, total in self._communicator.sum_gradients(buckets):
            result.extend(s / tf.cast(total, s.dtype) for s in sums)
        return result


def _sample_count() -> Any:
    count = getattr(_traced, "samples", None)
    if count is None:
        raise RuntimeError(
            "This optimizer is distributed, but nothing says how many samples are behind its "
            "gradients. Call `runtime.broadcast(model)` before `model.fit`; in a training loop "
            "of your own put `with runtime.samples(count):` around `optimizer.apply_gradients`."
        )
    return count


def cut(tensors: Sequence[tf.Tensor], buckets: int) -> list[list[tf.Tensor]]:
    """Cuts tensors, in order, into at most `buckets` runs of about equal bytes, none empty."""
    sizes = [(t.shape.num_elements() or 1) * t.dtype.size for t in tensors]
    total, done = sum(sizes), 0
    result: list[list[tf.Tensor]] = [[] for _ in range(buckets)]
    for tensor, size in zip(tensors, sizes, strict=True):
        middle = done + size / 2
        result[min(int(middle * buckets / total), buckets - 1)].append(tensor)
        done += size
    return [bucket for bucket in result if bucket]


def distribute(
    optimizer: keras.optimizers.Optimizer, communicator: Communicator, buckets: int = 1
) -> keras.optimizers.Optimizer:
    """Makes `optimizer` reduce its gradients; returns it. Does not communicate.

    Args:
        optimizer: Any Keras 3 optimizer; changed in place, once.
        communicator: The ranks. With one rank nothing is changed.
        buckets: Grouped collectives a step, 1 or more; one by default. More let the reduction
            of the last layers overlap the backward pass of the first.

    Raises:
        TypeError: `optimizer` is not a Keras 3 optimizer.
        ValueError: `buckets` is below 1.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"distribute() takes a Keras 3 optimizer such as keras.optimizers.Adam(), got "
            f"{optimizer!r} of {type(optimizer).__module__}.{type(optimizer).__qualname__}."
        )
    if buckets < 1:
        raise ValueError(f"gradient_buckets must be 1 or more, got {buckets}.")
    if communicator.size > 1 and not is_distributed(optimizer):
        optimizer.apply = ReducedApply(optimizer, communicator, buckets)
    return optimizer


def is_distributed(optimizer: Any) -> bool:
    """Whether `distribute` has been applied to this very object."""
    return isinstance(getattr(optimizer, "apply", None), ReducedApply)


def settle(optimizer: Any, communicator: Communicator) -> None:
    """Moves the reduction from inside a `LossScaleOptimizer` to its outside.

    Keras wraps the optimizer of a mixed-precision model on `compile`. The wrapper looks for
    non-finite gradients before it calls the inner optimizer; reduced first, they are non-finite
    on every rank alike, and all ranks skip the step.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None and is_distributed(inner):
        buckets = inner.apply._buckets
        del inner.apply
        distribute(optimizer, communicator, buckets)
