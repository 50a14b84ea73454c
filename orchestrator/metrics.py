"""Global metrics: the state of every metric summed over all ranks in one collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from orchestrator.communicators.base import Communicator


@dataclass(frozen=True)
class MetricState:
    """One rank's metric state at one moment, as host arrays.

    Attributes:
        values: One array a metric variable of the model, in the order of its metrics.
        extras: Named numbers that are no metric (what a `train_step` of the user's returns):
            averaged over the ranks.
    """

    values: list[np.ndarray]
    extras: Mapping[str, float] = field(default_factory=dict)


def snapshot(model: keras.Model, logs: Mapping[str, Any] | None = None) -> MetricState:
    """Copies the model's metric state to the host; does not communicate.

    Args:
        model: Compiled, its metrics built.
        logs: What Keras reports; names that no metric of the model gives become `extras`.
    """
    values = [np.array(v.numpy()) for v in model.metrics_variables]
    return with_logs(MetricState(values), model, logs or {})


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
    return MetricState(state.values, extras)


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

    Each variable is combined as it declares (`keras.Variable.aggregation`): `"sum"` (all of
    Keras's metrics), `"mean"`, or `"only_first_replica"` (rank 0's). The sum is made in float64.

    Args:
        communicator: The ranks.
        model: The model whose metric variables the states are of.
        states: As many on every rank, taken at the same moments.

    Raises:
        ValueError: On every rank: a metric variable declares no aggregation.
    """
    kinds = [_aggregation(model, v) for v in model.metrics_variables]
    parts: list[np.ndarray] = []
    for state in states:
        for kind, value in zip(kinds, state.values, strict=True):
            mine = communicator.rank == 0 or kind != "only_first_replica"
            parts.append(value.astype(np.float64).reshape(-1) * mine)
        parts.append(np.array([state.extras[name] for name in sorted(state.extras)], np.float64))
    flat = communicator.allreduce(np.concatenate(parts))

    result: list[MetricState] = []
    offset = 0
    for state in states:
        values = []
        for kind, value in zip(kinds, state.values, strict=True):
            total = flat[offset : offset + value.size].reshape(value.shape)
            offset += value.size
            values.append(total / communicator.size if kind == "mean" else total)
        names = sorted(state.extras)
        means = flat[offset : offset + len(names)] / communicator.size
        offset += len(names)
        result.append(MetricState(values, dict(zip(names, means.tolist(), strict=True))))
    return result


def _aggregation(model: keras.Model, variable: Any) -> str:
    kind = variable.aggregation
    if kind in ("sum", "mean", "only_first_replica"):
        return kind
    owner = next((m.name for m in model.metrics if any(v is variable for v in m.variables)), "?")
    raise ValueError(
        f"Metric {owner!r} keeps the variable {variable.path!r} with aggregation={kind!r}, which "
        "does not say how the ranks' values combine. Allowed: 'sum', 'mean', "
        "'only_first_replica'. Create it with `self.add_variable(..., aggregation='sum')`."
    )


def results(model: keras.Model, state: MetricState) -> dict[str, float]:
    """What the model's metrics give for a state, by their own `result()`.

    The model's own metric state is left as it is. Does not communicate.
    """
    mapping = list(zip(model.metrics_variables, state.values, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        # Read in the scope: a metric's `result()` may give the variable itself.
        values = {name: _number(value) for name, value in model.get_metrics_result().items()}
    return {**values, **state.extras}


def _number(value: Any) -> Any:
    array = keras.ops.convert_to_numpy(value)
    return float(array) if array.ndim == 0 else array
