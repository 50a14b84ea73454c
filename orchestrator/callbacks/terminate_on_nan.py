"""`TerminateOnNaN` on many ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np

from orchestrator.callbacks.rank_aware import RankAware


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

    Raises:
        RuntimeError: On every rank, with `raise_error`.
    """

    _epoch = 0
    _found: _Found | None = None
    _ended = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts afresh."""
        self._epoch, self._found, self._ended = 0, None, False
        self._runtime.flags.down("nan")

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
        """By all ranks, after the same step."""
        self._ended = True
        everyone = self._runtime.communicator.allgather_object(self._found)
        first = min((_Found(*found) for found in everyone if found), default=otherwise)
        self._runtime.flags.down("nan")
        if first is None:
            return
        self._emit("nan", first.epoch, first.rank, batch=first.batch, loss=first.loss)
        where = f" on rank {first.rank}" if self._runtime.size > 1 else ""
        if self.raise_error:
            raise RuntimeError(
                f"NaN or Inf loss encountered at batch {first.batch}{where}. "
                f"Loss value: {first.loss}. Terminating training immediately."
            )
        self._runtime.say(f"Batch {first.batch}{where}: Invalid loss, terminating training")
        self.model.stop_training = True


def _is_bad(loss: Any) -> bool:
    return loss is not None and not np.isfinite(loss)
