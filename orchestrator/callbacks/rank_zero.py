"""`RankZero`: any callback, on rank 0 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.callbacks.root_hooks import RootHooks
from orchestrator.config import SettingError


class RankZero(RankAware):
    """Runs a callback that knows nothing of ranks on rank 0 alone, with global metrics.

    For callbacks that look and tell, such as MLflow's, Weights & Biases' or Comet's. On all
    ranks. The callback sees global logs as epochs and evaluations end (an evaluation's take one
    allreduce, where the callback has `on_test_end`); within an epoch, those of rank 0's part.

    What it raises is raised on all ranks: as training begins, as epochs, evaluations and
    predictions end, and as training ends (one small broadcast each). An error within an epoch waits
    until then, and so does `model.stop_training = True`, which then stops all ranks. What it
    writes into logs stays with it. It must not change weights or the learning rate, nor call
    `model.fit` or `model.evaluate`, which need all ranks.

    If it has `get_state()` and `set_state(state)`, its state is saved and taken up with the
    training's.

    Args:
        callback: A Keras callback; or a function that makes one, called on rank 0 alone where
            other ranks must not even make it.

    Attributes:
        callback: The callback; `None` on the other ranks if it is made by a function.

    Raises:
        SettingError: `callback` is neither.
        RankError: On the other ranks, for what it raises on rank 0.
    """

    def __init__(
        self, callback: keras.callbacks.Callback | Callable[[], keras.callbacks.Callback]
    ) -> None:
        super().__init__()
        made = isinstance(callback, keras.callbacks.Callback)
        if not made and (isinstance(callback, type) or not callable(callback)):
            raise SettingError(
                f"RankZero({callback!r}) is not allowed: give it a Keras callback, or a function "
                "without arguments that makes one."
            )
        self.callback: Any = callback if made else None
        self._make = None if made else callback
        self._stop = self._training = False

    def set_model(self, model: keras.Model) -> None:
        """Makes the callback where that is asked for (one small broadcast)."""
        super().set_model(model)
        self._hooks = RootHooks(self._runtime)
        self._training = self._stop = False
        self._tells_tests = self._hooks.share(self._ready)

    def _ready(self) -> bool:
        """Gives the callback the model; says whether it has an `on_test_end`."""
        if self.callback is None:
            made = self._make() if self._make is not None else None
            if not isinstance(made, keras.callbacks.Callback):
                raise SettingError(
                    f"RankZero: the function gave {made!r}, which is no Keras callback."
                )
            self.callback = made
        self.callback.set_model(self.model)
        if self.params is not None:
            self.callback.set_params(self.params)
        own = getattr(type(self.callback), "on_test_end", None)
        return own is not keras.callbacks.Callback.on_test_end or "on_test_end" in vars(
            self.callback
        )

    def set_params(self, params: dict[str, Any]) -> None:
        """Hands them on."""
        super().set_params(params)
        if "_hooks" in vars(self):
            self._hooks.run(lambda: self.callback.set_params(params))

    def _call(self, hook: str, *arguments: Any) -> None:
        """One hook of the callback, on rank 0; it gets a copy of the logs."""
        *others, logs = arguments
        before = getattr(self.model, "stop_training", False)
        try:
            getattr(self.callback, hook)(*others, None if logs is None else dict(logs))
        finally:
            if getattr(self.model, "stop_training", False) and not before:
                self.model.stop_training, self._stop = False, True

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Hands it on; an error is raised on all ranks."""
        self._training = True
        self._hooks.share(lambda: self._call("on_train_begin", logs))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on."""
        self._hooks.run(self._call, "on_epoch_begin", epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on."""
        self._hooks.run(self._call, "on_train_batch_begin", batch, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on, with the logs of rank 0's part."""
        self._hooks.run(self._call, "on_train_batch_end", batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on; an error, or that it stops training, is heard by all ranks."""

        def end() -> bool:
            self._call("on_epoch_end", epoch, logs)
            return self._stop

        if self._hooks.share(end):
            self._stop = False
            self.model.stop_training = True
            self._emit("stop", epoch, callback=type(self.callback).__name__)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Hands it on; an error is raised on all ranks."""
        self._training = False
        self._hooks.share(lambda: self._call("on_train_end", logs))

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Hands it on."""
        self._hooks.run(self._call, "on_test_begin", logs)

    def on_test_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on."""
        self._hooks.run(self._call, "on_test_batch_begin", batch, logs)

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on, with the logs of rank 0's part."""
        self._hooks.run(self._call, "on_test_batch_end", batch, logs)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Hands global results on; outside of training an error is raised on all ranks."""
        if self._tells_tests:
            logs = self._of_all_ranks(logs)
        self._hooks.run(self._call, "on_test_end", logs)
        if not self._training:
            self._hooks.share()

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Hands it on."""
        self._hooks.run(self._call, "on_predict_begin", logs)

    def on_predict_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on."""
        self._hooks.run(self._call, "on_predict_batch_begin", batch, logs)

    def on_predict_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Hands it on."""
        self._hooks.run(self._call, "on_predict_batch_end", batch, logs)

    def on_predict_end(self, logs: dict[str, Any] | None = None) -> None:
        """Hands it on; an error is raised on all ranks."""
        self._hooks.run(self._call, "on_predict_end", logs)
        self._hooks.share()

    def get_state(self) -> dict[str, Any]:
        """The callback's class and, where it has one, its state; asked on rank 0."""
        states: list[Any] = []
        if callable(getattr(self.callback, "get_state", None)):
            self._hooks.run(lambda: states.append(self.callback.get_state()))
        return {"class": type(self.callback).__name__, "states": states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Hands its state to a callback of the same class (one small broadcast)."""

        def give() -> None:
            takes = callable(getattr(self.callback, "set_state", None))
            if takes and state["states"] and type(self.callback).__name__ == state["class"]:
                self.callback.set_state(state["states"][0])

        self._hooks.share(give)
