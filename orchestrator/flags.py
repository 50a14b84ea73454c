"""What one rank has to tell all others at the end of a step, in the collective that runs anyway."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import tensorflow as tf

NAMES = ("failed", "save", "preempt", "nan")


class Flags:
    """Flags that any rank raises, at any time and from any thread, and all see after one step.

    They travel beside the sample count of each training step. All ranks see the same ones after
    the same step, whichever rank raised them, and so can act together.

    Args:
        alone: There is one rank, whose own flags are all there are.
    """

    def __init__(self, alone: bool = False) -> None:
        self._alone = alone
        self._raised = np.zeros(len(NAMES), np.float32)
        self._lock = threading.Lock()

    @functools.cached_property
    def _own(self) -> Any:
        return _on_the_host()

    @functools.cached_property
    def _all(self) -> Any:
        return _on_the_host()

    def up(self, name: str) -> None:
        """Raises a flag on this rank; it stays up. Does not communicate."""
        self._set(name, 1)

    def down(self, name: str) -> None:
        """Takes this rank's flag down, if it is up, and forgets it of all ranks.

        Called by all ranks after the same step, once they have seen it.
        """
        self._set(name, 0)
        if not self._alone:
            self._all.assign(self._all.numpy() * [other != name for other in NAMES])

    def seen(self, name: str) -> bool:
        """Whether some rank had it up when the last step was made; the same on all ranks."""
        everyone = self._raised if self._alone else self._all.numpy()
        return bool(everyone[NAMES.index(name)])

    def _set(self, name: str, value: float) -> None:
        # Else one thread's older copy could take another's flag down again.
        with self._lock:
            self._raised[NAMES.index(name)] = value
            if not self._alone:
                self._own.assign(self._raised)

    def own(self) -> tf.Tensor:
        """This rank's, (flags,) float32; called while a step is traced."""
        return self._own.read_value()

    def show(self, everyone: Any) -> None:
        """Keeps the sum over ranks; called while a step is traced."""
        self._all.assign(everyone)


def _on_the_host() -> Any:
    # Read and written by Python between steps: on a GPU each read would wait for it.
    with tf.init_scope(), tf.device("/CPU:0"):
        return tf.Variable(tf.zeros(len(NAMES)), trainable=False)
