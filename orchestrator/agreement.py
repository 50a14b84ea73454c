"""What may fail on one rank only, done so that all ranks know of it before any goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from orchestrator import waits
from orchestrator.communicators.base import Communicator
from orchestrator.config import SettingError

T = TypeVar("T")
_Told = tuple[bool, str] | None  # of an exception: whether it is a SettingError, and its text


class RankError(RuntimeError):
    """Something has failed on another rank; raised on those that it concerns as well."""


class EarlyExitError(RuntimeError):
    """`sys.exit` on a rank that others wait for.

    Args:
        code: What it was called with.
        where: In which of our calls.
    """

    def __init__(self, code: Any, where: str) -> None:
        super().__init__(
            f"sys.exit({code!r}) was called in {where}, where the other ranks wait for this one. "
            "To end training on all ranks set model.stop_training = True on all of them."
        )


def on_root(communicator: Communicator, function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 and returns its result on all ranks; called by all ranks.

    One small broadcast of the result, which must be picklable, or of how it failed.

    Raises:
        SettingError: On every rank, where rank 0 raised one.
        RankError: On the other ranks, for any other exception of rank 0, which raises its own.
    """
    value, error = _attempt(function) if communicator.rank == 0 else (None, None)
    watched = waits.of(communicator)
    with contextlib.nullcontext() if watched is None else watched.for_root():
        value, told = communicator.broadcast_object((value, _told(error)))
    if told is not None:
        raise error or _of_another_rank(0, told)
    return cast(T, value)


def on_all(communicator: Communicator, function: Callable[[], T]) -> T:
    """Runs `function` on every rank and returns each rank's own result; called by all ranks.

    For what may fail on one rank only, such as importing a module: the ranks tell each other how
    it went (one small collective) before any goes on.

    Raises:
        SettingError: On every rank, where the first rank that failed raised one.
        RankError: On the ranks that did not fail themselves, for any other exception.
    """
    value, error = _attempt(function)
    everyone = communicator.allgather_object(_told(error))
    failed = next((rank for rank, told in enumerate(everyone) if told is not None), None)
    if failed is not None:
        raise error or _of_another_rank(failed, everyone[failed])
    return cast(T, value)


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except SystemExit as error:
        if type(error) is not SystemExit:
            raise
        return None, EarlyExitError(error.code, getattr(function, "__qualname__", "a function"))
    except Exception as error:  # noqa: BLE001 - raised by the caller, once all ranks know
        return None, error


def _told(error: Exception | None) -> _Told:
    return None if error is None else (isinstance(error, SettingError), str(error))


def _of_another_rank(rank: int, told: tuple[bool, str]) -> Exception:
    is_setting, text = told
    return SettingError(text) if is_setting else RankError(f"Rank {rank} failed: {text}")
