"""Around `model.fit` on many ranks: who prints, whose data it is, and how a rank may leave it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from orchestrator import waits
from orchestrator.agreement import EarlyExitError
from orchestrator.communicators.base import Communicator
from orchestrator.optimizer import calls

_MARK = "_orchestrator_part"
_NOT_SHARDED = (
    "model.fit was given data that does not come from runtime.shard(): each rank trains on all "
    "that it is given. If every rank is given the same, give it runtime.shard(data) instead; if "
    "each is given its own part, this is as it should be."
)


def mark(part: Any) -> Any:
    """Notes that data come from `shard`; returns them."""
    for one in part if isinstance(part, tuple) else (part,):
        if isinstance(one, tf.data.Dataset):
            setattr(one, _MARK, True)
    return part


def is_part(data: Any) -> bool:
    """Whether data come from `shard`, or from what does, by tf.data's own methods."""
    if not isinstance(data, tf.data.Dataset):
        return False
    return hasattr(data, _MARK) or any(map(is_part, data._inputs()))


def around(model: keras.Model, communicator: Communicator, say: Callable[[str], None]) -> None:
    """Wraps `fit` on the instance.

    Only rank 0 prints progress. `sys.exit` in it is an error, which ends all ranks: the others
    would wait for this one.
    """
    fit = model.fit
    signature = inspect.signature(fit)
    watched = waits.of(communicator)

    def on_many_ranks(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if communicator.rank != 0 and "verbose" in signature.parameters:
            bound.arguments["verbose"] = 0
        if "x" in bound.arguments and not is_part(bound.arguments["x"]):
            say(_NOT_SHARDED)
        if watched is not None and getattr(model, "optimizer", None) is not None:
            watched.step = int(calls(model.optimizer).numpy())
        try:
            return fit(*bound.args, **bound.kwargs)
        except SystemExit as error:
            if type(error) is not SystemExit:  # Preempted, by all ranks together
                raise
            raise EarlyExitError(error.code, "model.fit") from error

    model.fit = on_many_ranks
