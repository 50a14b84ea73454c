"""What a model's metrics do on many ranks while a step of it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from orchestrator import additive


@contextlib.contextmanager
def step(model: keras.Model, count: Any) -> Iterator[None]:
    """Goes around a model's step while it is traced; does not communicate.

    Inside, metrics that have to be are checked, and a mean that is told one number a batch, such
    as the loss of one output, counts it by the batch's samples: the ranks' parts may be uneven.
    Metrics are as before once it ends, and those built inside have no state of a step without
    samples.

    Args:
        model: Compiled, or with metrics of its own.
        count: Scalar, this rank's samples in this step; 0 where it has none.
    """
    with contextlib.ExitStack() as stack:
        checks, seen = additive.checks_of(model), set[int]()

        def watch() -> None:
            for metric in additive.leaves(model):
                if id(metric) not in seen:
                    _watch(stack, metric, checks, count)
                    seen.add(id(metric))

        watch()
        for compiled in (model._compile_metrics, model._compile_loss):
            # Keras builds them inside the first step, and only then they have metrics.
            if compiled is not None and not compiled.built:
                _replace(stack, compiled, "build", _followed_by(watch, compiled.build))
        known = {id(v) for v in additive.state_variables(model)}
        yield
        late = [m for m in additive.leaves(model) if {id(v) for v in m.variables} - known]
        if late:
            # Whoever restores the state after a step without samples could not know of these.
            tf.cond(tf.convert_to_tensor(count) > 0, tf.no_op, lambda: _reset(late))


def _reset(metrics: list[keras.Metric]) -> tf.Operation:
    for metric in metrics:
        metric.reset_state()
    return tf.no_op()


def _watch(
    stack: contextlib.ExitStack, metric: Any, checks: dict[keras.Metric, additive.Check], count: Any
) -> None:
    if type(metric) is keras.metrics.Mean:
        _replace(stack, metric, "update_state", _weighting(metric.update_state, count))
    elif type(metric) is keras.metrics.MeanMetricWrapper:
        _replace(stack, metric, "_fn", _spreading(metric._fn, count))
    elif not additive.is_keras(metric) and not additive.merges(metric):
        check = checks.setdefault(metric, additive.Check(metric))
        _replace(stack, metric, "update_state", _checking(metric.update_state, check, count))


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute past Keras's tracking, until the stack is left."""
    own = vars(owner)
    if name in own:
        stack.callback(own.__setitem__, name, own[name])
    else:
        stack.callback(own.pop, name)
    own[name] = value


def _followed_by(then: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then()
        return result

    return both


def _checking(update: Callable[..., Any], check: additive.Check, count: Any) -> Callable[..., Any]:
    def update_state(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)  # first: it may create variables
        check.run(update, count, args, kwargs)
        return result

    return update_state


def _weighting(update: Callable[..., Any], count: Any) -> Callable[..., Any]:
    def update_state(values: Any, sample_weight: Any = None) -> Any:
        if sample_weight is None and tf.convert_to_tensor(values).shape.rank == 0:
            sample_weight = count
        return update(values, sample_weight=sample_weight)

    return update_state


def _spreading(function: Callable[..., Any], count: Any) -> Callable[..., Any]:
    def fn(*args: Any, **kwargs: Any) -> Any:
        values = function(*args, **kwargs)
        return tf.fill([count], values) if values.shape.rank == 0 else values

    return fn
