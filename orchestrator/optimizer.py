"""Keras optimizers that reduce their gradients across ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from orchestrator.communicators.base import WIRES, Communicator, Wire
from orchestrator.flags import Flags
from orchestrator.gradients import Reduction
from orchestrator.times import Times

_numbers = itertools.count()


class ReducedApply:
    """Stands in for one optimizer's `apply`: gradients first become the global batch's.

    The optimizer keeps its class, its config and its variables, so files it is saved in load
    where this package is not installed. With `gradient_accumulation_steps` each rank adds up its
    own share, and gradients are reduced on update steps only; the counts, one number, each step.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, reduction: Reduction) -> None:
        self._optimizer = optimizer
        self._apply = optimizer.apply
        self.reduction = reduction

    def __call__(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Reduces `grads` (dense or `IndexedSlices`, `None` where there is none), then applies."""
        grads = list(grads)
        variables = None if trainable_variables is None else list(trainable_variables)
        # The backward pass yields the last layers' gradients first.
        order = [i for i in reversed(range(len(grads))) if grads[i] is not None]
        if order:
            own = [grads[i] for i in order]

            def reduce(own: list[Any]) -> list[Any]:
                if self._optimizer.gradient_accumulation_steps:
                    return self._accumulated(own, self._accumulators(variables, order))
                return self.reduction.mean(own)

            times = self.reduction.times
            reduced = reduce(own) if times is None else times.reducing(own, reduce)
            for i, grad in zip(order, reduced, strict=True):
                grads[i] = grad
        self._apply(grads, variables)

    def _accumulators(self, variables: list[Any] | None, order: list[int]) -> list[Any]:
        """Keras's own accumulators of the variables with gradients."""
        optimizer = self._optimizer
        known = optimizer._trainable_variables if variables is None else variables
        if not optimizer.built:
            with keras.name_scope(optimizer.name, caller=optimizer):
                optimizer.build(known)
        return [
            optimizer._accumulated_gradients[optimizer._get_variable_index(known[i])] for i in order
        ]

    def _accumulated(self, grads: list[Any], accumulators: list[Any]) -> list[Any]:
        """This rank's share, or on an update step the sum of what all ranks have accumulated.

        Keras adds its accumulator to what it is given. It is emptied before, so that what is
        applied has the same bytes on every rank.
        """
        steps = self._optimizer.gradient_accumulation_steps
        own = [tf.convert_to_tensor(share) for share in self.reduction.shares(grads)]

        def everyone() -> list[Any]:
            mine = [a.value + tf.cast(g, a.dtype) for a, g in zip(accumulators, own, strict=True)]
            sums = self.reduction.sum(mine)
            for accumulator in accumulators:
                accumulator.assign(tf.zeros(accumulator.shape, accumulator.dtype))
            return [tf.cast(s, g.dtype) for s, g in zip(sums, own, strict=True)]

        is_update = (tf.convert_to_tensor(calls(self._optimizer)) + 1) % steps == 0
        return list(tf.cond(is_update, everyone, lambda: list(own)))


def distribute(
    optimizer: keras.optimizers.Optimizer,
    communicator: Communicator,
    buckets: int = 1,
    compression: Wire | None = None,
    flags: Flags | None = None,
    times: Times | None = None,
) -> keras.optimizers.Optimizer:
    """Makes `optimizer` reduce its gradients; returns it. Does not communicate.

    Args:
        optimizer: Any Keras 3 optimizer; changed in place, once.
        communicator: The ranks. With one rank nothing is changed.
        buckets: Grouped collectives a step, 1 or more; one by default. More let the reduction
            of the last layers overlap the backward pass of the first.
        compression: `"fp16"` or `"bf16"`: dense gradients travel in half precision. `None`, the
            default, sends them as they are.
        flags: Travel beside the count of each step; none by default.
        times: Where the seconds of the reduction are noted; nowhere by default.

    Raises:
        TypeError: `optimizer` is not a Keras 3 optimizer.
        ValueError: `buckets` is below 1, or `compression` is unknown.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"distribute() takes a Keras 3 optimizer such as keras.optimizers.Adam(), got "
            f"{optimizer!r} of {type(optimizer).__module__}.{type(optimizer).__qualname__}."
        )
    if buckets < 1:
        raise ValueError(f"gradient_buckets must be 1 or more, got {buckets}.")
    if compression is not None and compression not in WIRES:
        raise ValueError(f"compression={compression!r} is unknown. Allowed: {WIRES} or None.")
    if communicator.size > 1 and not is_distributed(optimizer):
        # Ranks that distribute their optimizers in one order give them the same names.
        name = f"optimizer.{next(_numbers)}"
        _replace(optimizer, Reduction(communicator, name, buckets, compression, flags, times))
    return optimizer


def _replace(optimizer: Any, reduction: Reduction) -> None:
    optimizer.apply = ReducedApply(optimizer, reduction)


def is_distributed(optimizer: Any) -> bool:
    """Whether `distribute` has been applied to this very object."""
    return isinstance(getattr(optimizer, "apply", None), ReducedApply)


def settle(optimizer: Any) -> None:
    """Moves the reduction from inside a `LossScaleOptimizer` to its outside.

    Keras wraps the optimizer of a mixed-precision model on `compile`. The wrapper looks for
    non-finite gradients before it calls the inner optimizer; reduced first, they are non-finite
    on every rank alike, and all ranks skip the step. Accumulated gradients are then reduced each
    step: a step that one rank skipped alone would part the ranks.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None and is_distributed(inner):
        reduction = inner.apply.reduction
        del inner.apply
        _replace(optimizer, reduction)


def calls(optimizer: Any) -> Any:
    """The variable that counts an optimizer's steps; `iterations` counts its updates."""
    return optimizer._iterations


def own_state(optimizer: Any) -> list[Any]:
    """The variables of an optimizer that differ between ranks: what each has accumulated."""
    return accumulators(optimizer) if is_distributed(optimizer) else []


def accumulators(optimizer: Any) -> list[Any]:
    """Where an optimizer adds up gradients between its updates; none where it does not."""
    return [v for v in getattr(optimizer, "_accumulated_gradients", []) if v is not None]


def is_between_updates(optimizer: Any) -> bool:
    """Whether gradients have been accumulated since the last update."""
    steps = optimizer.gradient_accumulation_steps
    return bool(steps) and int(calls(optimizer).numpy()) % steps != 0
