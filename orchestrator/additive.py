"""Which metric states add up over ranks: those of Keras's classes do, others are checked.

A metric class of a user's own that says nothing of how ranks combine has variables that say
`"sum"`, Keras's default. It is checked in its first steps: updated twice with one batch, a state
that adds up changes twice as much as updated once. What is seen travels with the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# What a check says of a variable. Those from _STARTS on are refused.
_UNSEEN, _ADDS, _STARTS, _BENDS, _ELSEWHERE = range(5)
_ATTRIBUTE = "_orchestrator_checks"
_HOW = (
    "The ranks' states would be summed, and the result would be wrong. Define on the class\n"
    "    def merge_state(self, states):\n"
    "        # One list of NumPy arrays a rank, each in the order of self.variables.\n"
    "        return [np.maximum.reduce(arrays) for arrays in zip(*states)]  # a maximum, say\n"
    "or create the variable with add_variable(..., aggregation='mean') or 'only_first_replica', "
    "where that is meant. See docs/custom-metrics.md."
)


def leaves(model: keras.Model) -> list[keras.Metric]:
    """The model's metrics with `compile`'s laid open, in the order of its `metrics_variables`."""
    result: list[keras.Metric] = []
    for metric in model.metrics:
        compiled = metric is getattr(model, "_compile_metrics", None)
        result.extend(metric.metrics if compiled else [metric])
    return result


def state_variables(model: keras.Model) -> list[Any]:
    """The metrics' variables, also of those that `compile` was given and builds in its first step.

    Keras counts these among the model's only once a step has been traced.
    """
    found = {id(v): v for v in model.metrics_variables}
    compiled = getattr(model, "_compile_metrics", None)
    if compiled is not None and not compiled.built:
        given = (compiled._user_metrics, compiled._user_weighted_metrics)
        for metric in tf.nest.flatten(given):
            if isinstance(metric, keras.Metric):
                found.update((id(v), v) for v in metric.variables)
    return list(found.values())


def merges(metric: keras.Metric) -> bool:
    """Whether the metric says itself how the ranks' states combine."""
    return callable(getattr(metric, "merge_state", None))


def is_keras(metric: Any) -> bool:
    """Whether the metric's very class is one of Keras's, which all add up."""
    return type(metric).__module__.partition(".")[0] == "keras"


def checked_variables(metric: keras.Metric) -> list[Any]:
    """The variables whose `"sum"` is checked before it is believed."""
    if is_keras(metric) or merges(metric):
        return []
    return [v for v in metric.variables if v.aggregation == "sum"]


class Check:
    """One metric's check; runs in each step until every variable has been seen to change."""

    def __init__(self, metric: keras.Metric) -> None:
        self._metric = metric
        self._pending: Any = None
        self._rows: Any = None

    def run(self, update: Callable[..., Any], count: Any, args: Any, kwargs: Any) -> None:
        """Adds the check to the step being traced, or makes it where steps run eagerly.

        Args:
            update: The metric's own `update_state`, which has been called once.
            count: Scalar, the samples of this rank's batch; without any nothing is checked.
            args: What `update_state` was given.
            kwargs: What it was given by name.
        """
        variables = checked_variables(self._metric)
        if not variables:
            return
        if self._rows is None:
            with tf.init_scope():
                self._rows = tf.Variable(tf.zeros((len(variables), 3), tf.float64))
                self._pending = tf.Variable(tf.constant(True))
        tf.cond(
            self._pending & (tf.convert_to_tensor(count) > 0),
            lambda: self._look(variables, update, args, kwargs),
            tf.no_op,
        )

    def _look(self, variables: list[Any], update: Any, args: Any, kwargs: Any) -> tf.Operation:
        metric = self._metric
        start = metric.stateless_reset_state()
        once = _updated(metric, start, update, args, kwargs)
        twice = _updated(metric, once, update, args, kwargs)
        new = [
            _row(variable, *states)
            for variable, *states in zip(metric.variables, start, once, twice, strict=True)
            if any(variable is v for v in variables)
        ]
        rows = tf.where(self._rows[:, :1] == _UNSEEN, tf.stack(new), self._rows)
        self._rows.assign(rows)
        codes = rows[:, 0]
        self._pending.assign(tf.reduce_any(codes == _UNSEEN) & tf.reduce_all(codes < _STARTS))
        return tf.no_op()

    def rows(self) -> np.ndarray | None:
        """What has been seen, a row a variable: a code and two numbers; `None` before any."""
        return None if self._rows is None else self._rows.numpy()


def _updated(
    metric: keras.Metric, state: Sequence[Any], update: Any, args: Any, kwargs: Any
) -> list[Any]:
    mapping = list(zip(metric.variables, state, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        update(*args, **kwargs)
    return [scope.get_current_value(variable) for variable in metric.variables]


def _row(variable: Any, start: Any, once: Any, twice: Any) -> tf.Tensor:
    """A code, and the two numbers that show it best."""
    zero, one, two = (
        tf.reshape(tf.cast(tf.convert_to_tensor(state), tf.float64), [-1])
        for state in (start, once, twice)
    )
    change, double = one - zero, two - zero
    # A state that is infinite or no number says nothing here; it is the user's to see.
    finite = tf.math.is_finite(change) & tf.math.is_finite(double)
    change, double = (tf.where(finite, x, tf.zeros_like(x)) for x in (change, double))
    error = tf.abs(double - 2 * change)
    tolerance = 1e-4 if variable.dtype not in ("float16", "bfloat16") else 0.05
    bends = tf.reduce_any(error > tolerance * tf.reduce_max(tf.abs(double) + tf.abs(change)))
    changes = tf.reduce_any(change != 0)
    code = tf.where(bends, _BENDS, tf.where(changes, _ADDS, _UNSEEN))
    shown = [change[tf.argmax(error)], double[tf.argmax(error)]]
    starts = tf.reduce_any(zero != 0)
    shown[0] = tf.where(starts, zero[tf.argmax(tf.abs(zero))], shown[0])
    code = tf.where(starts, _STARTS, code)
    return tf.stack([tf.cast(code, tf.float64), *shown])


def checks_of(model: keras.Model) -> dict[keras.Metric, Check]:
    """The model's checks, by metric; kept for as long as the model is."""
    checks = getattr(model, _ATTRIBUTE, None)
    if checks is None:
        checks = {}
        # Past Keras's tracking, so that what is saved or cloned does not know of it.
        object.__setattr__(model, _ATTRIBUTE, checks)
    return checks


def report(model: keras.Model, values: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """What this rank has seen, a row for each variable to check; the same shape on all ranks.

    Args:
        model: The model.
        values: Its metric variables' values at several moments.
    """
    checks = getattr(model, _ATTRIBUTE, {})
    result, index = [np.zeros((0, 3))], 0
    for metric in leaves(model):
        variables = checked_variables(metric)
        rows = checks[metric].rows() if metric in checks else None
        if rows is None:
            rows = np.zeros((len(variables), 3))
        for row, variable in zip(rows, variables, strict=True):
            place = index + next(i for i, v in enumerate(metric.variables) if v is variable)
            changed = max(_largest(state[place]) for state in values)
            if metric in checks and row[0] == _UNSEEN and changed > 0:
                row[:] = _ELSEWHERE, changed, 0
        result.append(rows)
        index += len(metric.variables)
    return np.concatenate(result)


def _largest(value: np.ndarray) -> float:
    return float(np.max(np.abs(value), where=np.isfinite(value), initial=0.0))


def refuse(model: keras.Model, reports: np.ndarray) -> None:
    """Raises for the first variable that some rank has seen not to add up.

    Args:
        model: The model.
        reports: Every rank's `report`, in rank order: (ranks, variables, 3).

    Raises:
        ValueError: Naming the metric, its variable, what was seen, and how to declare it.
    """
    owners = [(m, v) for m in leaves(model) for v in checked_variables(m)]
    for i, (metric, variable) in enumerate(owners):
        for rank, (code, first, second) in enumerate(reports[:, i]):
            if code >= _STARTS:
                seen = {
                    _STARTS: f"after reset_state() it is {first:g}, not 0",
                    _BENDS: f"one update changed it by {first:g}, and the same update made twice "
                    f"changed it by {second:g}, not {2 * first:g}",
                    _ELSEWHERE: f"it holds {first:g}, which no update_state() put there",
                }[int(code)]
                raise ValueError(
                    f"Metric {metric.name!r} of class {type(metric).__qualname__} keeps the "
                    f"variable {variable.path!r} with aggregation='sum' (Keras's default), but "
                    f"does not add up: on rank {rank}, {seen}. {_HOW}"
                )
