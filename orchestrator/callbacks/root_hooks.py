"""Hooks that run on rank 0 alone, whose failure all ranks learn of at the next occasion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from orchestrator.runtime import Runtime

T = TypeVar("T")


class RootHooks:
    """Between two calls of `share` rank 0 may fail with nobody there to be told.

    What it raises is kept, and its later hooks are left out, until all ranks meet in `share`.

    Args:
        runtime: The ranks.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._error: Exception | None = None

    def run(self, hook: Callable[..., Any], *args: Any) -> None:
        """Calls a hook on rank 0, and keeps what it raises; does not communicate."""
        if not self._runtime.is_root or self._error is not None:
            return
        try:
            hook(*args)
        except Exception as error:  # noqa: BLE001 - raised by `share`, once all ranks know
            self._error = error

    def share(self, function: Callable[[], T] | None = None) -> T | None:
        """Calls `function` on rank 0, unless a hook has failed; called by all ranks.

        One small broadcast: its result, or what it or a hook before has raised.

        Raises:
            Exception: On rank 0 as it was raised.
            RankError: On the others, or `SettingError` if it was one.
        """
        return self._runtime.on_root(lambda: self._result(function))

    def _result(self, function: Callable[[], T] | None) -> T | None:
        error, self._error = self._error, None
        if error is not None:
            raise error
        return None if function is None else function()
