"""Where a rank's time goes: into its own work, or into waiting for data and for other ranks."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import tensorflow as tf

from orchestrator.waits import STEPS, Waits

T = TypeVar("T")
_config = importlib.import_module("tensorflow.python.framework.config")


class Spent(NamedTuple):
    """Seconds of one rank over some training steps, and what it did between them.

    Attributes:
        steps: Calls of the training function.
        total: From the first to the last moment.
        data: Waiting for data; 0 where a call makes more than one step.
        reduction: From when its own gradients were there until everyone's were.
        inside: In the training function, `data` and `reduction` included.
        waiting: For other ranks, outside the training function.
    """

    steps: int
    total: float
    data: float
    reduction: float
    inside: float
    waiting: float

    @property
    def own(self) -> float:
        """Seconds in which it was not waiting for other ranks."""
        return self.total - self.reduction - self.waiting

    @property
    def between(self) -> float:
        """Seconds of its own outside the training function: callbacks, validation, saving."""
        return self.total - self.inside - self.waiting


class Times:
    """Adds up one rank's seconds; does not communicate.

    Inside the training function it is TensorFlow that reads the clock, when the operations before
    have ended; on a GPU that is when they have been handed to it.

    Args:
        waits: What this rank waits in, outside the graph.
    """

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._origin = time.time()  # sums of small numbers stay exact
        self._entered = 0.0
        self._steps = 0
        self._arrivals = True
        self._began = waits.clock()
        self._waited = dict(waits.seconds)

    @functools.cached_property
    def _arrived(self) -> Any:
        """The sum of the moments at which data were there."""
        return _sum()

    @functools.cached_property
    def _reduction(self) -> Any:
        """The sum of the seconds in the reduction."""
        return _sum()

    def begin(self, steps: int) -> None:
        """Notes that the training function is called, for so many steps."""
        self._steps += 1
        self._entered += time.time() - self._origin
        self._arrivals = steps == 1

    def arrived(self, data: Any) -> Any:
        """Notes when this step's data are there, and returns them; called while it is traced.

        The first tensor waits until the clock is read: to do more at once another thread would be
        woken, which takes longer.
        """
        leaves = tf.nest.flatten(data, expand_composites=True)
        tensors = [i for i, leaf in enumerate(leaves) if tf.is_tensor(leaf)]  # or `None`, a number
        with tf.control_dependencies([leaves[i] for i in tensors]):
            now = _now()
        self._arrived.assign_add(now - self._origin, read_value=False)
        with tf.control_dependencies([now]):
            for first in tensors[:1]:
                leaves[first] = tf.identity(leaves[first])
        return tf.nest.pack_sequence_as(data, leaves, expand_composites=True)

    def reducing(self, own: Sequence[Any], reduce: Callable[[list[Any]], T]) -> T:
        """Calls `reduce(own)`, whose time from when these are there is noted.

        While a step is traced. The last of `own`, which is best the one that is there last, waits
        until the clock is read, as in `arrived`.
        """
        *others, last = own
        with tf.control_dependencies(_tensors(own)):
            ready = _now()
        with tf.control_dependencies([ready]):
            last = _same(last)
        reduced = reduce([*others, last])
        with tf.control_dependencies(_tensors(reduced)):
            self._reduction.assign_add(_now() - ready, read_value=False)
        return reduced

    def take(self) -> Spent:
        """What was spent since the last time; begins anew."""
        now, waited = self._waits.clock(), dict(self._waits.seconds)
        arrived, reduction = (float(of.numpy()) for of in (self._arrived, self._reduction))
        calls = {call: s - self._waited.get(call, 0.0) for call, s in waited.items()}
        inside = sum(calls.pop(name, 0.0) for name in STEPS)
        data = arrived - self._entered if self._arrivals else 0.0
        spent = Spent(
            self._steps, now - self._began, max(data, 0.0), reduction, inside, sum(calls.values())
        )
        self._arrived.assign(0.0)
        self._reduction.assign(0.0)
        self._began, self._waited = now, waited
        self._entered, self._steps = 0.0, 0
        return spent


def _sum() -> Any:
    with tf.init_scope(), tf.device("/CPU:0"):
        return tf.Variable(tf.zeros([], tf.float64), trainable=False)


def _same(value: Any) -> Any:
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(tf.identity(value.values), value.indices, value.dense_shape)
    return tf.identity(value)


def _tensors(values: Any) -> list[Any]:
    return [v.values if isinstance(v, tf.IndexedSlices) else v for v in tf.nest.flatten(values)]


def _now() -> tf.Tensor:
    """The clock, as an operation; TensorFlow refuses its own where all have to be deterministic."""
    if _config.is_op_determinism_enabled():
        return tf.numpy_function(time.time, [], tf.float64)
    return tf.timestamp()
