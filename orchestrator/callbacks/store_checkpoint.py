"""Checkpoints in a `CheckpointStore`, written in the background while training goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import keras
import numpy as np

from orchestrator import runtime as runtimes
from orchestrator.callbacks.global_metrics import insert_first, members, move_last
from orchestrator.checkpoint.catalog import Checkpoint
from orchestrator.checkpoint.layout import WEIGHTS
from orchestrator.checkpoint.retention import EveryEpochs, Keep, Moment, Save
from orchestrator.checkpoint.state import Snapshot
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.checkpoint.writer import Writer
from orchestrator.optimizer import calls
from orchestrator.preemption import Preempted, Watch, check_notice
from orchestrator.restoring import Opened, open_newest, roll_back
from orchestrator.resume import files
from orchestrator.resume.epochs import Epochs, calling_fit
from orchestrator.resume.training import Place, Training
from orchestrator.weights import state_variables

_EACH_EPOCH = EveryEpochs(1)


class StoreCheckpoint(keras.callbacks.Callback):
    """Saves the whole training state to a store, from rank 0 alone, and goes on from there.

    On all ranks. They agree on each save: by epochs and steps, which all count alike, or by rank
    0's clock, which is told beside the gradients of the next step. What each rank holds by itself
    is gathered (one small message; moving statistics are merged for the file, one allreduce where
    there are any), rank 0 copies the state to host memory, and tells the others how that went
    (one small broadcast); it is written in the background. An error there is raised on all ranks
    at the end of a step soon after, and at the latest at the end of training, which waits until
    all is written.

    Weights that are NaN or infinite are not saved: nobody could go on from them.

    SIGTERM or SIGUSR1 on any rank, or a notice, is told beside the gradients of the next step.
    All ranks then save, wait until that is committed, and raise `Preempted`, which ends the
    process with 75.

    The callback puts itself last in the list, where it sees what others made of an epoch. What
    they remember is saved as well: of ours, and of any with `get_state()` and `set_state(state)`.

    Args:
        store: A `CheckpointStore`, or a URL for one.
        save: When to save: any of these `retention` policies; after each epoch by default.
        keep: What to keep: `retention` policies; none, the default, keeps everything.
        background: Whether to write in a thread. `False` holds up training for each save.
        when_busy: With a save still being written a new one waits (`"wait"`, the default), or is
            queued and replaced by a newer one (`"replace"`), at the price of a second buffer.
        timeout: Seconds to wait for the last save at the end of training.
        resume: Whether to go on from the newest whole checkpoint, if there is one; or one that
            was opened already. `False` by default.
        preempt_grace: Seconds from a notice to the end of the process, whatever it is doing then;
            25 by default. `None`: no notice is waited for.
        preempt_notice: A file or URL whose being there is a notice; looked at on rank 0.
        settings: What the run was started with, kept with the state.
        clock: Seconds, from any origin.

    Raises:
        SettingError: On every rank, before training: the store cannot be written, what it holds
            is of another model, or no filesystem is known for the notice.
        Preempted: On every rank, at the end of a step.
    """

    GRACE = 25.0  # below the 30 s that Kubernetes gives

    def __init__(
        self,
        store: CheckpointStore | str,
        *,
        save: Save | Iterable[Save] = _EACH_EPOCH,
        keep: Iterable[Keep] = (),
        background: bool = True,
        when_busy: Literal["wait", "replace"] = "wait",
        timeout: float = 300.0,
        resume: bool | Opened = False,
        preempt_grace: float | None = GRACE,
        preempt_notice: str | None = None,
        settings: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        keras.callbacks.Callback.__init__(self)  # a subclass may be one of Keras's too
        self.store = CheckpointStore(store) if isinstance(store, str) else store
        self._policies = tuple(save) if isinstance(save, Iterable) else (save,)
        self._keep = tuple(keep)
        self._resume = resume
        self._grace, self._notice = preempt_grace, preempt_notice
        if preempt_notice is not None:
            check_notice(preempt_notice)
        self._settings = settings
        self._clock = clock
        self._watch: Watch | None = None
        self._options: dict[str, Any] = {
            "background": background,
            "when_busy": when_busy,
            "timeout": timeout,
        }

    def set_model(self, model: keras.Model) -> None:
        """Sees to it that the metrics saved beside the weights are global."""
        super().set_model(model)
        self._runtime = runtimes.current()
        self._steps = self._runtime.prepare(model)
        insert_first(model)
        move_last(self)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Tries the store out, so that a wrong URL is known now, and goes on from what it holds."""
        if hasattr(self, "_writer"):  # of a training that was interrupted in this process
            self._runtime.on_root(self._writer.close)
        self._epochs = Epochs(calling_fit(), self._runtime.positions)
        self._training = Training(self._runtime, self.model, members(), self._epochs)
        self._writer = Writer(lambda: Snapshot(self.model), **self._options)
        self._runtime.on_root(self.store.preflight)
        for flag in ("failed", "save", "preempt"):  # of an earlier training
            self._runtime.flags.down(flag)
        self._goes_on: Mapping[str, Any] | None = None
        self._committed: int | None = None
        self._pruned = self._keep
        place = self._continue() or Place(0, 0, int(calls(self.model.optimizer).numpy()))
        self._runtime.on_root(self._prepare)
        self._epoch = place.epoch
        self._before = place.step - place.batch  # steps, by the last epoch's end
        self._batches = 0
        self._last = Moment(place.epoch, place.step, self._clock())
        if self._grace is not None:
            notice = self._notice if self._runtime.is_root else None
            self._watch = Watch(self._heard, grace=self._grace, notice=notice).__enter__()

    def _prepare(self) -> None:
        if self.model.built:
            state_variables(self.model)  # builds the optimizer, whose state is saved as well
            self._writer.prepare()

    def _continue(self) -> Place | None:
        """Takes up the newest checkpoint, or the one that was opened; by all ranks."""
        opened = self._resume
        if isinstance(opened, bool):
            opened = open_newest(self._runtime, self.store) if opened else None
        with contextlib.nullcontext() if opened is None else contextlib.closing(opened):
            if opened is None or opened.state is None:
                self._runtime.events.rewind(0, 0)
                return None
            place = self._training.go_on(opened, opened.state, self.params["epochs"])
        self._committed = place.step
        self._goes_on = opened.state if place.batch else None
        return place

    def _heard(self, what: str) -> None:
        """Called in a thread, on the rank that got a notice."""
        self._why = what
        self._runtime.flags.up("preempt")

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts steps on from the epochs before."""
        self._epoch = epoch
        self._before, self._batches = self._before + self._batches, 0
        self._epochs.begin()
        if self._goes_on is not None:
            self._batches = self._goes_on["batch"]
            self._training.resume_metrics(self._goes_on)
            self._goes_on = None

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Saves where steps or minutes say so, and raises what failed in the background."""
        self._batches = batch + 1
        self._epochs.step()
        flags = self._runtime.flags
        if flags.seen("failed"):
            self._runtime.on_root(self._writer.close)  # raises what failed
        if flags.seen("preempt"):
            self._preempt(logs or {})
        if self._epochs.is_last(batch):
            return  # the end of the epoch knows more
        if flags.seen("save") or self._due(self._last.time):
            self._save({}, logs or {}, batch + 1)
        elif self._runtime.is_root and self._due(self._clock()):
            flags.up("save")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Saves where epochs say so, with the epoch's metrics."""
        self._epoch = epoch + 1
        asked = self._runtime.flags.seen("save") and self._now().step > self._last.step
        if asked or self._due(self._last.time):
            self._save(logs or {}, {}, 0)
        elif self._now().step == self._last.step:  # saved with the epoch's last batch
            self._last = dataclasses.replace(self._last, epoch=self._epoch)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until all is written. A notice ends that only where it takes too long."""
        self._runtime.on_root(self._writer.close)
        self.close()
        self.model._initial_epoch = None

    def close(self) -> None:
        """No longer listens for signals; called where training ends, however it does."""
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def roll_back(self) -> Checkpoint | None:
        """Gives the model the newest whole checkpoint's weights; by all ranks, between two steps.

        See `restoring.roll_back`. Waits for saves in the background.
        """
        self._runtime.on_root(self._writer.flush)
        return roll_back(self._runtime, self.store, self.model)

    def _now(self) -> Moment:
        return Moment(self._epoch, self._before + self._batches, self._clock())

    def _due(self, when: float) -> bool:
        """Whether a policy asks for a save at a time; never twice at one step."""
        now = dataclasses.replace(self._now(), time=when)
        return now.step > self._last.step and any(p.due(self._last, now) for p in self._policies)

    def _preempt(self, logs: Mapping[str, Any]) -> None:
        """Saves this moment, waits for it, and ends training; by all ranks."""
        self._pruned = ()  # what is old can wait for the next start
        if self._now().step > self._last.step:
            self._save({}, logs, self._batches)
        committed = self._runtime.on_root(self._flushed)
        reasons = self._runtime.communicator.allgather_object(getattr(self, "_why", None))
        told = ((rank, why) for rank, why in enumerate(reasons) if why)
        rank, why = next(told, (0, "a notice"))
        step = self._last.step
        last = "nothing is" if committed is None else f"step {committed} is the last"
        which = "which is committed in" if committed == step else f"and {last} in"
        self._runtime.events.emit("preempt", epoch=self._epoch, step=step, rank=rank, notice=why)
        if self._watch is not None:
            self._watch.committed()
            self._watch = None  # it hears signals until the process ends
        raise Preempted(
            f"Preempted ({why} on rank {rank}) at step {step}, {which} {self.store.url}. "
            "The same command goes on from there.",
            epoch=self._epoch,
            step=step,
        )

    def _flushed(self) -> int | None:
        """The last step that is committed, once all is written; on rank 0."""
        self._writer.close()
        return self._committed

    def _save(self, metrics: Mapping[str, Any], last_logs: Mapping[str, Any], batch: int) -> None:
        """Saves this moment; by all ranks."""
        self._last = now = self._now()
        self._runtime.flags.down("save")
        merged = [] if self._steps is None else self._steps.statistics.merged()
        place = Place(self._epoch, batch, now.step)
        state = self._training.state(place, last_logs, self._settings)
        values = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        self._runtime.on_root(
            lambda: self._writer.submit(
                lambda snapshot: snapshot.copy(merged),
                lambda snapshot: self._write(snapshot, state, place, values),
            )
        )

    def _write(
        self, snapshot: Snapshot, state: Any, place: Place, metrics: Mapping[str, float]
    ) -> None:
        """Commits one checkpoint; on rank 0, in the writer's thread."""
        epoch = None if place.epoch == 0 else place.epoch - 1
        broken = snapshot.not_finite()
        if broken is not None:
            self._runtime.say(f"Not saved at step {place.step}: {broken} is not finite.")
            return
        try:
            saved = self.store.save(
                {
                    WEIGHTS: snapshot.write_weights,
                    files.JSON: state.write_json,
                    files.ARRAYS: state.write_arrays,
                },
                step=place.step,
                epoch=epoch,
                metrics=metrics,
                world_size=self._runtime.size,
            )
            self._committed = place.step
            if self._pruned:
                self.store.prune(self._pruned)
        except BaseException:
            self._runtime.flags.up("failed")
            raise
        self._runtime.events.emit(
            "checkpoint", epoch=epoch, step=place.step, rank=0, path=saved.url, state=True
        )
