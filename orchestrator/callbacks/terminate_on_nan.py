"""`TerminateOnNaN` on many ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np

from orchestrator.callbacks import rates
from orchestrator.callbacks.global_metrics import members
from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.callbacks.store_checkpoint import StoreCheckpoint
from orchestrator.config import SettingError


class _Found(NamedTuple):
    epoch: int
    batch: int
    rank: int
    loss: float


class TerminateOnNaN(RankAware, keras.callbacks.TerminateOnNaN):
    """Ends training on all ranks when the loss of any is NaN or infinite; Keras's parameters.

    On all ranks. A rank that finds it says so beside the gradients of the next step, with no
    message more, and all end after that step; after an epoch's last step they know by the global
    loss. Which rank it was, and at which batch, is then gathered (one small message) and recorded
    in an event of kind `nan`. In one process it ends at the batch itself, as Keras does.

    With `rollbacks` training goes on instead, so many times at most: all ranks take the weights
    and the optimizer's state of the newest whole checkpoint of the `StoreCheckpoint` beside it
    (one read, one broadcast), and the learning rate of now times `factor`. The data, generators
    and other callbacks go on where they are, and the epoch's metrics begin anew. Where there is no
    checkpoint yet, and after the last rollback, it ends.

    Args:
        raise_error: As Keras's.
        rollbacks: How often to go back instead of ending; 0 by default.
        factor: Of the learning rate then, above 0 and at most 1; 0.5 by default.

    Raises:
        RuntimeError: On every rank, with `raise_error`.
        SettingError: On every rank, before training: `rollbacks` without a `StoreCheckpoint`, or
            with a learning rate that cannot be set.
    """

    _epoch = 0
    _found: _Found | None = None
    _ended = False

    def __init__(
        self, raise_error: bool = False, *, rollbacks: int = 0, factor: float = 0.5
    ) -> None:
        super().__init__(raise_error=raise_error)
        if rollbacks < 0 or not 0 < factor <= 1:
            raise ValueError(
                f"TerminateOnNaN(rollbacks={rollbacks}, factor={factor}) is not allowed: rollbacks "
                "is 0 or more, factor above 0 and at most 1."
            )
        self.rollbacks = rollbacks
        self.factor = factor
        self._done = 0

    def get_state(self) -> dict[str, Any]:
        """What is remembered: rollbacks made."""
        return {"rollbacks": self._done}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes up what `get_state` gave."""
        self._done = state["rollbacks"]

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts afresh."""
        self._epoch, self._found, self._ended, self._done = 0, None, False, 0
        self._runtime.flags.down("nan")
        found = [one for one in members() if isinstance(one, StoreCheckpoint)]
        self._saver = found[0] if found else None
        if self.rollbacks:
            self._check()

    def _check(self) -> None:
        schedules = keras.optimizers.schedules.LearningRateSchedule
        asked = f"TerminateOnNaN(rollbacks={self.rollbacks})"
        if self._saver is None:
            raise SettingError(
                f"{asked} goes back to checkpoints: put a StoreCheckpoint into the callbacks as "
                "well, or leave rollbacks out."
            )
        for _, optimizer in rates.optimizers(self.model):
            inner = getattr(optimizer, "inner_optimizer", optimizer)  # under loss scaling
            if isinstance(inner._learning_rate, schedules):
                raise SettingError(
                    f"{asked} lowers the learning rate, and that of {optimizer.name!r} is a "
                    "LearningRateSchedule. Give it a number, or leave rollbacks out."
                )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keeps the epoch, for what it says."""
        self._epoch = epoch

    def on_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks at this rank's loss, and at what the others found in the step before."""
        flags = self._runtime.flags
        if self._look(batch, logs):
            flags.up("nan")
        if not self._ended and flags.seen("nan"):
            self._end()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks at the global loss: after the last step there is no next one to tell it."""
        loss: Any = (logs or {}).get("loss")
        if not self._ended and _is_bad(loss):
            steps = (self.params or {}).get("steps") or 1
            self._end(_Found(epoch, steps - 1, 0, float(loss)))

    def _look(self, batch: int, logs: dict[str, Any] | None) -> bool:
        """Whether this rank's loss is bad for the first time."""
        loss: Any = (logs or {}).get("loss")
        if self._found is not None or not _is_bad(loss):
            return False
        self._found = _Found(self._epoch, batch, self._runtime.rank, float(loss))
        return True

    def _end(self, otherwise: _Found | None = None) -> None:
        """Ends or rolls back; by all ranks, after the same step."""
        everyone = self._runtime.communicator.allgather_object(self._found)
        first = min((_Found(*found) for found in everyone if found), default=otherwise)
        self._runtime.flags.down("nan")
        if first is None:
            self._ended = True
            return
        where = f"batch {first.batch}{f' on rank {first.rank}' if self._runtime.size > 1 else ''}"
        if self._done < self.rollbacks and self._roll_back(first, where):
            return
        self._ended = True
        self._emit("nan", first.epoch, first.rank, batch=first.batch, loss=first.loss)
        if self.raise_error:
            raise RuntimeError(
                f"NaN or Inf loss encountered at {where}. "
                f"Loss value: {first.loss}. Terminating training immediately."
            )
        self._runtime.say(f"{where.capitalize()}: Invalid loss, terminating training")
        self.model.stop_training = True

    def _roll_back(self, found: _Found, where: str) -> bool:
        """Whether there was a checkpoint to go back to; by all ranks."""
        before = rates.learning_rates(self.model)
        checkpoint = self._saver.roll_back() if self._saver is not None else None
        if checkpoint is None:
            return False
        self._done += 1
        self._found = None
        for name, optimizer in rates.optimizers(self.model):
            rates.set_learning_rate(optimizer, before[name] * self.factor, False)
        self.model.reset_metrics()
        lowered = rates.learning_rates(self.model)
        self._emit(
            "nan",
            found.epoch,
            found.rank,
            batch=found.batch,
            loss=found.loss,
            restored=checkpoint.step,
            **lowered,
        )
        shown = ", ".join(f"{name} {rate:.3g}" for name, rate in lowered.items())
        self._runtime.say(
            f"{where.capitalize()}: Invalid loss, back to the weights of step {checkpoint.step} "
            f"with {shown} (rollback {self._done} of {self.rollbacks})"
        )
        return True


def _is_bad(loss: Any) -> bool:
    return loss is not None and not np.isfinite(loss)
