"""`GlobalMetrics`: what every callback and `History` see is global."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from orchestrator import metrics
from orchestrator import runtime as runtimes


class GlobalMetrics(keras.callbacks.Callback):
    """Replaces each epoch's logs, training and validation, by those of all ranks together.

    On all ranks. One allreduce an epoch: the training state is copied before validation begins
    and travels with the validation state. Results are computed by Keras's own `result()` from
    global state, and written into the logs that all later callbacks, `History` and the progress
    bar see. Callbacks of this package put one first in the list by themselves.

    Logs that no metric of the model gives (a custom `train_step` may return some) are averaged
    over the ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._training = False
        self._train: metrics.MetricState | None = None
        self._test: metrics.MetricState | None = None

    def set_model(self, model: keras.Model) -> None:
        """Readies the model's steps for uneven parts."""
        super().set_model(model)
        self._runtime = runtimes.current()
        self._steps = self._runtime.prepare(model)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Forgets the epoch before."""
        self._training = True
        self._train = self._test = None

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Keeps the training state, which validation is about to reset."""
        if self._training and self._runtime.size > 1:
            self._train = metrics.snapshot(self.model)

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Keeps the validation state."""
        if self._training and self._runtime.size > 1:
            self._test = metrics.snapshot(self.model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Combines both in one collective and rewrites `logs`."""
        self._training = False
        if self._steps is not None:
            self._steps.statistics.merge()
        if self._runtime.size == 1 or logs is None:
            return
        train = self._train or metrics.snapshot(self.model)
        states = [metrics.with_logs(train, self.model, logs)]
        if self._test is not None:
            states.append(self._test)
        combined = metrics.global_states(self._runtime.communicator, self.model, states)
        logs.update(metrics.results(self.model, combined[0]))
        if self._test is not None:
            validation = metrics.results(self.model, combined[1])
            logs.update({f"val_{name}": value for name, value in validation.items()})


def insert_first(model: keras.Model) -> None:
    """Puts a `GlobalMetrics` first in the `CallbackList` that is calling `set_model`.

    Keras hands a callback no reference to the `CallbackList` it is in, so it is looked up among
    the callers. Where there is none (callbacks driven by hand) nothing is done: the logs passed
    by hand must then be global already.
    """
    callback_list = _calling_list()
    if callback_list is None:
        return
    members = callback_list.callbacks
    own = next((c for c in members if isinstance(c, GlobalMetrics)), None)
    if own is not None and members[0] is own:
        return
    if own is None:
        own = GlobalMetrics()
    else:
        members.remove(own)
    members.insert(0, own)
    own.set_model(model)


def move_last(callback: keras.callbacks.Callback) -> None:
    """Puts a callback last in the `CallbackList` that is calling its `set_model`.

    There it sees what all others, `History` included, have made of an epoch.
    """
    callback_list = _calling_list()
    if callback_list is not None:
        # A new list: Keras is going through the present one.
        others = [one for one in callback_list.callbacks if one is not callback]
        callback_list.callbacks = [*others, callback]


def members() -> list[Any]:
    """The callbacks in the list that is calling, in order; none where there is no list."""
    callback_list = _calling_list()
    return [] if callback_list is None else list(callback_list.callbacks)


def _calling_list() -> keras.callbacks.CallbackList | None:
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.callbacks.CallbackList):
            return owner
        frame = frame.f_back
    return None
