"""What a `fit`'s callbacks remember: those with `get_state()` and `set_state(state)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import keras


def states(members: Sequence[Any]) -> list[dict[str, Any]]:
    """The callbacks' states, by class, in the order of the list; does not communicate."""
    return [{"class": _name(one), "state": one.get_state()} for one in _stateful(members)]


def restore(members: Sequence[Any], saved: Sequence[dict[str, Any]]) -> list[str]:
    """Gives callbacks their states back: the first of a class the first one saved, and so on.

    Returns:
        What does not fit, in words: states without a callback, callbacks without a state.
    """
    left = list(saved)
    fresh = []
    for one in _stateful(members):
        entry = next((entry for entry in left if entry["class"] == _name(one)), None)
        if entry is None:
            fresh.append(f"{_name(one)} is new and starts afresh")
            continue
        left.remove(entry)
        one.set_state(entry["state"])
    return fresh + [f"{entry['class']} is gone" for entry in left]


def history(model: keras.Model) -> dict[str, Any]:
    """What `fit` has put into its `History`."""
    own = cast(Any, model.history)
    return {"epoch": list(own.epoch), "history": {k: list(v) for k, v in own.history.items()}}


def restore_history(model: keras.Model, saved: dict[str, Any]) -> None:
    """Makes the `History` go on from there."""
    own = cast(Any, model.history)
    own.epoch = list(saved["epoch"])
    own.history = {name: list(values) for name, values in saved["history"].items()}


def _stateful(members: Sequence[Any]) -> Iterator[Any]:
    for one in members:
        if callable(getattr(one, "get_state", None)) and callable(getattr(one, "set_state", None)):
            yield one


def _name(callback: Any) -> str:
    return type(callback).__name__
