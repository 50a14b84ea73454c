"""`evaluate`: global results outside `fit`."""

from __future__ import annotations

from typing import Any

import keras

from orchestrator import metrics
from orchestrator.runtime import current


def evaluate(model: keras.Model, part: Any, **options: Any) -> dict[str, float]:
    """Evaluates on every rank's part and returns global results; called by all ranks.

    Args:
        model: Compiled.
        part: This rank's data, as `Runtime.shard` gives it.
        options: Passed on to `model.evaluate`; `verbose` is 0 by default.

    Returns:
        A number for each metric, the same on every rank; one collective in all.
    """
    runtime = current()
    runtime.prepare(model)
    options = {"verbose": 0, **options, "return_dict": True}
    logs = model.evaluate(part, **options)
    if runtime.size == 1:
        return logs
    state = metrics.snapshot(model, logs)
    (state,) = metrics.global_states(runtime.communicator, model, [state])
    return metrics.results(model, state)
