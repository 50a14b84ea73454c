"""What each rank holds by itself while it trains: it is not in rank 0's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from orchestrator import losses, metrics, weights
from orchestrator.optimizer import accumulators, is_between_updates
from orchestrator.resume import randomness
from orchestrator.steps import Steps


def state(model: keras.Model, steps: Steps | None) -> dict[str, Any]:
    """This rank's; does not communicate.

    Args:
        model: The model in training.
        steps: Its steps; `None` with one rank.
    """
    return {
        "random": randomness.state(),
        "seeds": _values(weights.seed_variables(model)),
        "metrics": _values(model.metrics_variables),
        "losses": losses.batch_losses(model),
        "statistics": None if steps is None else steps.statistics.state(),
        "accumulated": _values(_accumulated(model)),
    }


def restore(
    model: keras.Model, steps: Steps | None, saved: Sequence[dict[str, Any]], rank: int, size: int
) -> None:
    """Takes up this rank's state; does not communicate. Metrics have a function of their own.

    Called when the weights are rank 0's on all ranks. With another number of ranks than saved the
    model's seeds are left as they are, ranks that were not there take rank 0's generators, and
    what had been accumulated is rank 0's alone.
    """
    mine = saved[rank if rank < len(saved) else 0]
    if len(saved) == size:
        _assign(weights.seed_variables(model), mine["seeds"])
    roll_back(model, steps, saved, rank, size)
    randomness.restore(mine["random"])


def roll_back(
    model: keras.Model, steps: Steps | None, saved: Sequence[dict[str, Any]], rank: int, size: int
) -> None:
    """As `restore`, but for seeds and generators, which go on as they are."""
    same = len(saved) == size
    if same and steps is not None:
        steps.statistics.restore(saved[rank]["statistics"])
    _assign(_accumulated(model), _share([one["accumulated"] for one in saved], rank, same))


def restore_metrics(
    model: keras.Model, saved: Sequence[dict[str, Any]], rank: int, size: int
) -> None:
    """Takes up this rank's metrics in the middle of an epoch; does not communicate."""
    same = len(saved) == size
    values = [one["metrics"] for one in saved]
    own = values[rank] if same else metrics.share(model, values, rank)
    _assign(model.metrics_variables, own)
    parts = [one["losses"] for one in saved]
    losses.restore(model, parts[rank] if same else np.sum(parts, 0) * (rank == 0))


def _accumulated(model: keras.Model) -> list[Any]:
    """Gradients accumulated since the last update; none where there has just been one."""
    found = [o for o in weights.optimizers(model) if is_between_updates(o)]
    return [variable for optimizer in found for variable in accumulators(optimizer)]


def _share(saved: list[list[np.ndarray]], rank: int, same: bool) -> list[np.ndarray]:
    if same:
        return saved[rank]
    totals = [np.sum(arrays, axis=0) for arrays in zip(*saved, strict=True)]
    return [total * (rank == 0) for total in totals]


def _values(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.array(variable.numpy()) for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
