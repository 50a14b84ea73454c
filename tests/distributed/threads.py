"""Ranks that are threads of one process: the communicator for fast tests.

    results = threads.run(3, lambda communicator: communicator.allgather_object(communicator.rank))

Stricter than any real backend: ranks that call different collectives, or pass arrays of different
shapes or dtypes, get an error instead of a hang.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from orchestrator.communicators.base import Op

T = TypeVar("T")
_FOLD = {"sum": operator.add, "min": np.minimum, "max": np.maximum}


class Aborted(RuntimeError):
    """What `abort` raises: there is no process to end."""


class World:
    """What the threads share."""

    def __init__(self, size: int, deadline: float) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=deadline)
        self._slots: list[Any] = [None] * size

    def exchange(self, rank: int, call: tuple[Any, ...], value: Any) -> list[Any]:
        """Every rank's value, in rank order; `call` says which collective this is."""
        self._slots[rank] = (call, value)
        self._barrier.wait()
        slots = list(self._slots)
        self._barrier.wait()
        calls = [call for call, _ in slots]
        if any(other != calls[0] for other in calls):
            raise RuntimeError(f"The ranks make different collective calls: {calls} (by rank).")
        return [value for _, value in slots]

    def break_up(self) -> None:
        """Wakes every waiting rank with `threading.BrokenBarrierError`."""
        self._barrier.abort()


class ThreadCommunicator:
    """One rank of a `World`."""

    name = "threads"

    def __init__(self, world: World, rank: int) -> None:
        self._world = world
        self.rank = self.local_rank = rank
        self.size = self.local_size = world.size

    def _exchange(self, value: Any, *call: Any) -> list[Any]:
        return self._world.exchange(self.rank, call, value)

    def allreduce(self, array: np.ndarray, op: Op = "sum") -> np.ndarray:
        array = np.asarray(array)
        values = self._exchange(np.array(array), "allreduce", op, array.shape, array.dtype)
        return np.array(functools.reduce(_FOLD[op], values), array.dtype)

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        array = np.asarray(array)
        call = ("broadcast", root, array.shape, array.dtype)
        return np.array(self._exchange(np.array(array), *call)[root])

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        return self._exchange(obj, "broadcast_object", root)[root]

    def allgather_object(self, obj: Any) -> list[Any]:
        return self._exchange(obj, "allgather_object")

    def barrier(self) -> None:
        self._exchange(None, "barrier")

    def abort(self, code: int) -> None:
        raise Aborted(f"abort({code}) on rank {self.rank}")

    def lost(self, error: BaseException) -> bool:
        return isinstance(error, threading.BrokenBarrierError)

    def sum_gradients(
        self, buckets: Sequence[Sequence[Any]], name: str, wire: str | None = None
    ) -> list[list[Any]]:
        return [
            self._sum_bucket(f"{name}.{index}", list(bucket), wire)
            for index, bucket in enumerate(buckets)
        ]

    def _sum_bucket(self, name: str, tensors: list[Any], wire: str | None) -> list[Any]:
        import tensorflow as tf

        def add(*arrays: np.ndarray) -> list[np.ndarray]:
            call = ("sum_gradients", name, *((a.shape, str(a.dtype)) for a in arrays))
            ranks = self._exchange([np.array(a) for a in arrays], *call)
            return [
                np.asarray(functools.reduce(operator.add, same))
                for same in zip(*ranks, strict=True)
            ]

        half = {"fp16": tf.float16, "bf16": tf.bfloat16}
        sent = [tf.cast(t, half[wire]) for t in tensors] if wire else tensors
        sums = tf.numpy_function(add, sent, [t.dtype for t in sent])
        if not isinstance(sums, (list, tuple)):
            sums = [sums]  # so it is where one tensor is reduced eagerly
        return [
            tf.cast(tf.ensure_shape(s, t.shape), t.dtype)
            for s, t in zip(sums, tensors, strict=True)
        ]

    def concat_rows(self, tensor: Any, name: str) -> Any:
        import tensorflow as tf

        def gather(rows: np.ndarray) -> np.ndarray:
            call = ("concat_rows", name, rows.shape[1:], str(rows.dtype))
            return np.concatenate(self._exchange(np.array(rows), *call))

        return tf.ensure_shape(
            tf.numpy_function(gather, [tensor], tensor.dtype), [None, *tensor.shape[1:]]
        )


def run(size: int, function: Callable[[ThreadCommunicator], T], deadline: float = 60) -> list[T]:
    """Calls `function` on `size` ranks at once.

    Returns:
        What each rank returned, in rank order.

    Raises:
        Exception: The first that any rank raised; ranks that wait for it in a collective are
            woken, and their own errors are noted on it.
        TimeoutError: Some rank had not returned after `deadline` seconds; it says where it stood.
    """
    world = World(size, deadline)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = function(ThreadCommunicator(world, rank))
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            errors.append((rank, error))
            world.break_up()

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"rank-{rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = [thread for thread in threads if thread.is_alive()]
    if late:
        message = "\n".join(_where(thread) for thread in late)
        world.break_up()
        raise TimeoutError(f"Not done after {deadline} s:\n{message}")
    if errors:
        (rank, first), *others = errors
        first.add_note(f"Raised on rank {rank} of {size}.")
        for rank, other in others:
            first.add_note(f"Then on rank {rank}: {type(other).__name__}: {str(other)[:300]}")
        raise first
    return results


def run_with_runtime(
    size: int, function: Callable[[Any], T], deadline: float = 120, **options: Any
) -> list[T]:
    """As `run`, with a `Runtime` for each rank that is its thread's current one."""
    from orchestrator.runtime import Runtime

    def with_runtime(communicator: ThreadCommunicator) -> T:
        with Runtime(communicator, **options).use() as runtime:
            return function(runtime)

    return run(size, with_runtime, deadline)


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread.name}:\n{''.join(traceback.format_stack(frame)) if frame else 'ended'}"
