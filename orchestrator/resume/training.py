"""The state of a training at the end of a step: taken on all ranks, taken up on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from orchestrator import weights
from orchestrator.config import SettingError
from orchestrator.resume import files, members, own
from orchestrator.resume.epochs import Epochs
from orchestrator.runtime import Runtime

if TYPE_CHECKING:
    from orchestrator.restoring import Opened

FORMAT = 1


class Place(NamedTuple):
    """A place in a training.

    Attributes:
        epoch: Whole epochs done.
        batch: Batches of the present epoch done; 0 between epochs.
        step: Steps done by the optimizer.
    """

    epoch: int
    batch: int
    step: int


class Training:
    """One `fit`, to be saved and continued.

    Args:
        runtime: The ranks.
        model: In training.
        callbacks: All of that `fit`, in order.
        epochs: Its epochs and data.
    """

    def __init__(
        self, runtime: Runtime, model: keras.Model, callbacks: Sequence[Any], epochs: Epochs
    ) -> None:
        self._runtime = runtime
        self._model = model
        self._callbacks = callbacks
        self._epochs = epochs
        self._steps = runtime.prepare(model)

    def state(
        self, place: Place, logs: Mapping[str, Any], settings: Mapping[str, Any] | None
    ) -> files.Packed | None:
        """Its state now, but for weights and optimizer; called by all ranks.

        One gather of what each rank holds by itself.

        Args:
            place: Where it is.
            logs: Of the last batch.
            settings: What the run was started with, as nested dictionaries, or `None`.

        Returns:
            The state on rank 0, `None` on the others.
        """
        runtime, model = self._runtime, self._model
        everyone = runtime.communicator.allgather_object(own.state(model, self._steps))
        if not runtime.is_root:
            return None
        return files.pack(
            {
                "format": FORMAT,
                **place._asdict(),
                "world_size": runtime.size,
                "seed": runtime.seed,
                "stopped": bool(model.stop_training),
                "logs": dict(logs),
                "settings": settings,
                "model": _signature(model),
                "data": self._epochs.state(),
                "history": members.history(model),
                "callbacks": members.states(self._callbacks),
                "decisions": runtime.events.decisions,
                "ranks": everyone,
            }
        )

    def go_on(self, opened: Opened, state: Mapping[str, Any], epochs: int) -> Place:
        """Takes up a checkpoint with its state, and says so; called by all ranks.

        The weights are broadcast.

        Args:
            opened: The checkpoint, open.
            state: Its training state.
            epochs: Of this `fit`, at most.

        Raises:
            SettingError: It is of another model, or of a newer version.
        """
        runtime, model = self._runtime, self._model
        self._check(state)
        opened.load(model)
        words = self._resume(state)
        epoch, batch, step = place = Place(state["epoch"], state["batch"], state["step"])
        ended = state["stopped"] and not batch
        model._initial_epoch = max(epoch, epochs) if ended else epoch
        where = f"epoch {epoch + 1}, batch {batch + 1}" if batch else f"epoch {epoch + 1}"
        runtime.say(
            f"Training ended before, after {epoch} epochs ({step} steps): {opened.checkpoint.url}"
            if model._initial_epoch >= epochs
            else f"Continuing at {where} (step {step}) from {opened.checkpoint.url}"
        )
        runtime.events.emit(
            "resume",
            epoch=epoch,
            step=step,
            rank=0,
            batch=batch,
            path=opened.checkpoint.url,
            ranks_before=state["world_size"],
            passed_over=opened.passed_over,
            callbacks=words,
        )
        return place

    def _resume(self, state: Mapping[str, Any]) -> list[str]:
        """Takes up a state, once the weights and the optimizer are loaded; called by all ranks.

        Does not communicate. What `fit` resets as an epoch begins is for `resume_metrics`.

        Returns:
            What of the callbacks does not fit, in words.
        """
        runtime, model = self._runtime, self._model
        own.restore(model, self._steps, state["ranks"], runtime.rank, runtime.size)
        members.restore_history(model, state["history"])
        words = members.restore(self._callbacks, state["callbacks"])
        self._epochs.resume(state["data"], state["epoch"], state["batch"])
        runtime.events.rewind(state["decisions"], state["step"])
        return words

    def resume_metrics(self, state: Mapping[str, Any]) -> None:
        """Takes up the metrics of the epoch that goes on, once Keras has reset them."""
        runtime, model = self._runtime, self._model
        compiled = getattr(model, "_compile_metrics", None)
        if compiled is not None and not compiled.built:
            model._symbolic_build(data_batch=self._epochs.element_spec())
        own.restore_metrics(model, state["ranks"], runtime.rank, runtime.size)
        _keep_logs(model, state["logs"])

    def _check(self, state: Mapping[str, Any]) -> None:
        """Builds the model where it is not yet, and compares it with the saved one's.

        Raises:
            SettingError: It is another model, or the state is of a newer version.
        """
        if state["format"] > FORMAT:
            raise SettingError(
                f"This checkpoint's training state has format {state['format']}; this version "
                f"reads formats up to {FORMAT}. Continue it with the version that wrote it."
            )
        if not self._model.built:
            self._model._symbolic_build(data_batch=self._epochs.element_spec())
        before, now = state["model"], _signature(self._model)
        for old, new in zip(before, now, strict=False):
            if old[1:] != new[1:]:
                raise SettingError(
                    f"The checkpoint is of another model: its variable {old[0]} has shape {old[1]} "
                    f"and type {old[2]}; {new[0]} has {new[1]} and {new[2]}. {_AGAIN}"
                )
        if len(before) != len(now):
            raise SettingError(
                f"The checkpoint is of another model or optimizer: it has {len(before)} variables, "
                f"this one {len(now)}. {_AGAIN}"
            )


_AGAIN = "Build the model and optimizer of the run that is continued, or start afresh elsewhere."


def _signature(model: keras.Model) -> list[list[Any]]:
    """Each variable's path, shape and type."""
    return [[v.path, list(v.shape), str(v.dtype)] for v in weights.state_variables(model)]


def _keep_logs(model: Any, logs: Mapping[str, Any]) -> None:
    """Has Keras take the last batch's logs from here, where the epoch has no batch left."""
    usual = model._get_metrics_result_or_logs

    def results(given: Any) -> Any:
        object.__delattr__(model, "_get_metrics_result_or_logs")
        return usual(given or dict(logs))

    object.__setattr__(model, "_get_metrics_result_or_logs", results)
