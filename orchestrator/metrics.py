"""Global metrics: the state of every metric summed over all ranks in one collective."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator import additive, losses
from orchestrator.communicators.base import Communicator


@dataclass(frozen=True)
class MetricState:
    """One rank's metric state at one moment, as host arrays.

    Attributes:
        values: One array a metric variable of the model, in the order of its metrics.
        extras: Named numbers that are no metric (what a `train_step` of the user's returns):
            averaged over the ranks.
        losses: (batches, 3), where the loss is no mean over samples; see `losses.batch_losses`.
    """

    values: list[np.ndarray]
    extras: Mapping[str, float] = field(default_factory=dict)
    losses: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))


def snapshot(model: keras.Model, logs: Mapping[str, Any] | None = None) -> MetricState:
    """Copies the model's metric state to the host; does not communicate.

    Args:
        model: Compiled, its metrics built.
        logs: What Keras reports; names that no metric of the model gives become `extras`.
    """
    values = [np.array(v.numpy()) for v in model.metrics_variables]
    state = MetricState(values, losses=losses.batch_losses(model))
    return with_logs(state, model, logs or {})


def with_logs(state: MetricState, model: keras.Model, logs: Mapping[str, Any]) -> MetricState:
    """The state with what in `logs`, of training or of both, no metric of the model gives."""
    if not logs:
        return state
    own = reported_names(model)
    extras = {
        name: float(value)
        for name, value in logs.items()
        if name not in own and name.removeprefix("val_") not in own
    }
    return dataclasses.replace(state, extras=extras)


_ATTRIBUTE = "_orchestrator_metric_names"


def reported_names(model: keras.Model) -> frozenset[str]:
    """The names under which the model's metrics report; does not communicate.

    Only `result()` tells them, as costly as the evaluation's own results: asked for once, until
    the model is compiled anew or its metrics are built.
    """
    now = [*model.metrics, *model.metrics_variables]
    then, names = getattr(model, _ATTRIBUTE, ([], frozenset[str]()))
    if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
        names = frozenset(model.get_metrics_result())
        object.__setattr__(model, _ATTRIBUTE, (now, names))
    return names


def global_states(
    communicator: Communicator, model: keras.Model, states: Sequence[MetricState]
) -> list[MetricState]:
    """Combines several states over all ranks in one allreduce; called by all ranks.

    A metric that defines `merge_state(states)` merges its state itself: each rank sends it in a
    slot of its own, and every rank calls it with all of them. The variables of any other are
    combined as they declare (`keras.Variable.aggregation`): `"sum"` (all of Keras's metrics),
    `"mean"`, or `"only_first_replica"` (rank 0's). Sums are made in float64. What
    `watch.step` has seen travels along.

    Args:
        communicator: The ranks.
        model: The model whose metric variables the states are of.
        states: As many on every rank, taken at the same moments.

    Raises:
        ValueError: On every rank: a metric does not say how it combines, or does not add up
            though its variables say so, or its `merge_state` returns something else than a state.
    """
    leaves = [(metric, _kinds(metric)) for metric in additive.leaves(model)]
    seen = additive.report(model, [state.values for state in states])
    parts = [part for state in states for part in _sent(communicator, leaves, state)]
    parts.append(_in_own_slot(communicator, seen))
    received = _Received(communicator.allreduce(np.concatenate(parts)))
    result = [_combined(communicator, leaves, state, received) for state in states]
    additive.refuse(model, received.take((communicator.size, *seen.shape)))
    return result


_Leaves = Sequence[tuple[keras.Metric, Sequence[str]]]
_MERGED = "merge_state"


def _kinds(metric: keras.Metric) -> list[str]:
    """How each of the metric's variables combines."""
    if additive.merges(metric):
        return [_MERGED] * len(metric.variables)
    _refuse_hidden_state(metric)
    for variable in metric.variables:
        if variable.aggregation not in ("sum", "mean", "only_first_replica"):
            raise ValueError(
                f"Metric {metric.name!r} keeps the variable {variable.path!r} with "
                f"aggregation={variable.aggregation!r}, which does not say how the ranks' values "
                "combine. Allowed: 'sum', 'mean', 'only_first_replica'. Create it with "
                "`self.add_variable(..., aggregation='sum')`, or define `merge_state(self, "
                "states)` on the metric. See docs/custom-metrics.md."
            )
    return [variable.aggregation for variable in metric.variables]


def _refuse_hidden_state(metric: keras.Metric) -> None:
    hidden = [name for name, value in vars(metric).items() if isinstance(value, tf.Variable)]
    if not additive.is_keras(metric) and (hidden or not metric.variables):
        where = f"in tf.Variables ({', '.join(hidden)})" if hidden else "in no variable"
        raise ValueError(
            f"Metric {metric.name!r} of class {type(metric).__qualname__} keeps its state {where}, "
            "so it cannot be combined over the ranks. Create its state with "
            "`self.add_variable(...)`, or define `merge_state(self, states)` on the metric if it "
            "has none. See docs/custom-metrics.md."
        )


def _in_own_slot(communicator: Communicator, value: np.ndarray) -> np.ndarray:
    """Zeros but in this rank's slot, so that the sum over the ranks is what each of them sent."""
    slots = np.zeros((communicator.size, value.size))
    slots[communicator.rank] = value.reshape(-1)
    return slots.reshape(-1)


def _sent(communicator: Communicator, leaves: _Leaves, state: MetricState) -> list[np.ndarray]:
    """What this rank puts into the sum for one state."""
    kinds = [kind for _, own in leaves for kind in own]
    parts = []
    for kind, value in zip(kinds, state.values, strict=True):
        if kind == _MERGED:
            parts.append(_in_own_slot(communicator, value))
        elif kind == "only_first_replica" and communicator.rank:
            parts.append(np.zeros(value.size))
        else:
            parts.append(value.astype(np.float64).reshape(-1))
    parts.append(np.array([state.extras[name] for name in sorted(state.extras)], np.float64))
    parts.append(state.losses.reshape(-1))
    return parts


class _Received:
    """The sum over the ranks, taken apart from its beginning on."""

    def __init__(self, flat: np.ndarray) -> None:
        self._rest = flat

    def take(self, shape: Sequence[int]) -> np.ndarray:
        size = int(np.prod(shape))
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken.reshape(shape)


def _combined(
    communicator: Communicator, leaves: _Leaves, state: MetricState, received: _Received
) -> MetricState:
    size, values, own = communicator.size, [], iter(state.values)
    for metric, kinds in leaves:
        mine = [next(own) for _ in kinds]
        if additive.merges(metric):
            gathered = [received.take((size, *v.shape)).astype(v.dtype) for v in mine]
            values += _merged(metric, gathered, size)
            continue
        totals = [received.take(v.shape) for v in mine]
        values += [t / size if k == "mean" else t for k, t in zip(kinds, totals, strict=True)]
    names = sorted(state.extras)
    means = received.take((len(names),)) / size
    extras = dict(zip(names, means.tolist(), strict=True))
    return MetricState(values, extras, received.take(state.losses.shape))


def _merged(metric: Any, gathered: list[np.ndarray], size: int) -> list[np.ndarray]:
    """What the metric makes of every rank's state: arrays of (ranks, ...), one a variable."""
    states = [[array[rank] for array in gathered] for rank in range(size)]
    merged = [np.asarray(value) for value in metric.merge_state(states)]
    got, expected = ([a.shape for a in merged], [a.shape[1:] for a in gathered])
    if got != expected:
        raise ValueError(
            f"merge_state of the metric {metric.name!r} returned arrays of shapes {got}, but its "
            f"variables have {expected}. It must return one array a variable, in the order of "
            "`variables`."
        )
    return merged


def share(model: keras.Model, values: Sequence[list[np.ndarray]], rank: int) -> list[np.ndarray]:
    """What a rank is to hold so that all together hold what other ranks held; no communication.

    Args:
        model: Its metrics built.
        values: Those other ranks' states, in their order.
        rank: This rank. What adds up is rank 0's, and nothing is the others'.
    """
    own, place = [], 0
    for metric in additive.leaves(model):
        kinds = _kinds(metric)
        gathered = [np.stack([state[place + i] for state in values]) for i in range(len(kinds))]
        place += len(kinds)
        empty = [np.asarray(value) for value in metric.stateless_reset_state()]
        if additive.merges(metric):
            own += _merged(metric, gathered, len(values)) if rank == 0 else empty
            continue
        for kind, array, nothing in zip(kinds, gathered, empty, strict=True):
            added = array.astype(np.float64).sum(0).astype(array.dtype) if rank == 0 else nothing
            whole = {"mean": array.mean(0), "only_first_replica": array[0]}
            own.append(whole.get(kind, added))
    return own


def results(model: keras.Model, state: MetricState) -> dict[str, float]:
    """What the model's metrics give for a state, by their own `result()`.

    The model's own metric state is left as it is. Does not communicate.
    """
    mapping = list(zip(model.metrics_variables, state.values, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope, contextlib.ExitStack() as stack:
        for metric, own in _counts(model, state):
            stack.enter_context(_computing_in_float64(metric))
            for variable, value in zip(metric.variables, own, strict=True):
                scope.add_update((variable, tf.constant(value, tf.float64)))
        # Read in the scope: a metric's `result()` may give the variable itself.
        values = {name: _number(value) for name, value in model.get_metrics_result().items()}
    if len(state.losses):
        values["loss"] = losses.mean_of(state.losses)
    return {**values, **state.extras}


def _counts(
    model: keras.Model, state: MetricState
) -> Iterator[tuple[keras.Metric, list[np.ndarray]]]:
    """The metrics whose result is a count, with their states: float32 ends at 2**24.

    Where a result is a ratio, counts rounded to float32 change it by no more than its rounding.
    """
    rest = iter(state.values)
    kinds = ("Sum", "TruePositives", "TrueNegatives", "FalsePositives", "FalseNegatives")
    for metric in additive.leaves(model):
        own = [next(rest) for _ in metric.variables]
        if type(metric) in [getattr(keras.metrics, kind) for kind in kinds]:
            yield metric, own


@contextlib.contextmanager
def _computing_in_float64(metric: keras.Metric) -> Iterator[None]:
    own = vars(metric)
    before = own["_dtype"]
    own["_dtype"] = "float64"
    try:
        yield
    finally:
        own["_dtype"] = before


def _number(value: Any) -> Any:
    array = keras.ops.convert_to_numpy(value)
    return float(array) if array.ndim == 0 else array
