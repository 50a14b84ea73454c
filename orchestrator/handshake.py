"""What all ranks must have alike before they train: told to each other, refused where it is not."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator.communicators.base import Communicator
from orchestrator.config import SettingError, Settings

Fact = str | list[str]


def agree(communicator: Communicator, facts: Mapping[str, Fact]) -> None:
    """Compares facts over all ranks; called by all.

    One small gather of digests, and a second one where any differ, of what they are.

    Args:
        communicator: The ranks.
        facts: By name; a list is compared item by item.

    Raises:
        SettingError: On every rank: which facts differ, and what each rank has.
    """
    if communicator.size == 1:
        return
    everyone = communicator.allgather_object({k: _digest(v) for k, v in facts.items()})
    names = list(dict.fromkeys(name for rank in everyone for name in rank))
    differing = [n for n in names if len({rank.get(n) for rank in everyone}) > 1]
    if not differing:
        return
    values = communicator.allgather_object({name: facts.get(name) for name in differing})
    lines = [f"  {name}: {_explain([rank[name] for rank in values])}" for name in differing]
    raise SettingError(
        "The ranks are not alike, and would not train the same model:\n"
        + "\n".join(lines)
        + "\nStart all of them with the same command, from the same files and packages."
    )


def of_programs(settings: Settings) -> dict[str, Fact]:
    """Versions, and every setting by its name: none may differ by rank."""
    package = sys.modules["orchestrator"]
    facts: dict[str, Fact] = {
        "Python": platform.python_version(),
        "TensorFlow": str(tf.__version__),
        "Keras": str(keras.__version__),
        "keras-orchestrator": str(package.__version__),
    }
    for section, values in settings.model_dump().items():
        if isinstance(values, dict):
            facts |= {f"{section}.{key}": repr(value) for key, value in values.items()}
        else:
            facts[section] = [repr(value) for value in values]
    return facts


def of_code(*functions: Any) -> dict[str, Fact]:
    """The files that the user's functions stand in, by what is in them."""
    facts: dict[str, Fact] = {}
    for function in functions:
        name = getattr(function, "__module__", "")
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and Path(file).is_file():
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
            facts[f"the source of {name}"] = f"sha256 {digest}"
    return facts


def of_training(model: keras.Model, callbacks: list[Any], data: Any) -> dict[str, Fact]:
    """What a training is made of: variables, callbacks, and steps of an epoch where known."""
    facts: dict[str, Fact] = {
        "the model": [f"{v.path} {tuple(v.shape)} {v.dtype}" for v in model.variables],
        "the optimizer": type(model.optimizer).__name__,
        "the callbacks": [type(callback).__name__ for callback in callbacks],
    }
    if isinstance(data, tf.data.Dataset) and int(data.cardinality()) >= 0:
        facts["steps of an epoch"] = str(int(data.cardinality()))
    return facts


def _digest(fact: Fact) -> str:
    return hashlib.sha256(repr(fact).encode()).hexdigest()[:16]


def _explain(values: list[Any]) -> str:
    """Who has what: of lists, the first item that differs."""
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) == len(values):
        length = max(map(len, lists))
        padded = [[*value, *["nothing"] * (length - len(value))] for value in lists]
        at = next(i for i, items in enumerate(zip(*padded, strict=True)) if len(set(items)) > 1)
        return f"number {at + 1} is " + _by_value([items[at] for items in padded])
    return _by_value(["nothing" if value is None else str(value) for value in values])


def _by_value(values: list[str]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    shown = {value: f"rank{'s' * (len(r) > 1)} {_some(r)}" for value, r in ranks.items()}
    return "; ".join(f"{value} on {who}" for value, who in shown.items())


def _some(ranks: list[str]) -> str:
    return (
        ", ".join(ranks) if len(ranks) <= 8 else f"{', '.join(ranks[:8])} and {len(ranks) - 8} more"
    )
