"""Which settings a run may be continued with that are not those it was begun with. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.config import SettingError

# A change here makes another training of it.
_FIXED = ("model", "data", "train.global_batch_size", "run.seed")
# These say where and how the process runs, not what it computes.
_FREE = ("run.dir", "run.resume", "run.init_from")


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compares the settings of a saved run with those it is to go on with.

    Args:
        before: As nested dictionaries, of the run that was saved.
        now: The present ones.

    Returns:
        The changes that are taken up, in words.

    Raises:
        SettingError: Something is changed that must not be; it says both values.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    changed = sorted(
        key for key in old.keys() | new.keys() if key not in _FREE and old.get(key) != new.get(key)
    )
    words = [f"{key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in changed]
    refused = [
        text for key, text in zip(changed, words, strict=True) if _is_fixed(key, new.get(key))
    ]
    if refused:
        raise SettingError(
            "The run in run.dir was begun with other settings, and cannot be continued with these: "
            f"{'; '.join(refused)}. Put them back, or choose another run.dir, or start there "
            "anew with run.resume=never."
        )
    return words


def _is_fixed(key: str, new: Any) -> bool:
    # Without a seed the run's own is taken.
    if key == "run.seed" and new is None:
        return False
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
