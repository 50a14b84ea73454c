"""Stand-ins: one rank of several, whose others say what is given, and a record of events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.events import Events


def others_add(samples: float, *gradients: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """What the other ranks put into a bucket: `samples` in all, and their sum for each gradient."""
    return lambda bucket: [*map(tf.constant, gradients), tf.constant(float(samples))]


class FakeCommunicator:
    """Rank `rank` of `size`. The other ranks say what this one says, unless a function is given.

    Args:
        rank: This rank.
        size: Ranks in all.
        reduce: Gives the allreduce's result for this rank's array.
        broadcast: On ranks but 0, gives the root's array or object for this rank's.
        gather: Gives all ranks' objects for this rank's.
        gradients: Gives the other ranks' sum for a bucket of this rank's tensors.
    """

    name = "fake"

    def __init__(
        self,
        rank: int = 0,
        size: int = 2,
        *,
        reduce: Callable[[np.ndarray], np.ndarray] | None = None,
        broadcast: Callable[[Any], Any] | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
        gradients: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
    ) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = size
        self.calls: list[str] = []
        self.buckets: list[int] = []
        self._reduce = reduce or (lambda array: array * size)
        self._broadcast = broadcast or (lambda value: value)
        self._gather = gather or (lambda obj: [obj] * size)
        self._gradients = gradients or (lambda bucket: [t * (size - 1) for t in bucket])

    def allreduce(self, array: np.ndarray, op: str = "sum") -> np.ndarray:
        self.calls.append("allreduce")
        assert op == "sum"
        result = np.array(self._reduce(array))
        assert (result.shape, result.dtype) == (array.shape, array.dtype)
        return result

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        self.calls.append("broadcast")
        return np.array(array if self.rank == root else self._broadcast(array))

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        self.calls.append("broadcast_object")
        return obj if self.rank == root else self._broadcast(obj)

    def allgather_object(self, obj: Any) -> list[Any]:
        self.calls.append("allgather_object")
        return self._gather(obj)

    def barrier(self) -> None:
        self.calls.append("barrier")

    def abort(self, code: int) -> None:
        raise AssertionError(f"abort({code})")

    def lost(self, error: BaseException) -> bool:
        return False

    def sum_gradients(
        self, buckets: Sequence[Sequence[Any]], name: str, wire: str | None = None
    ) -> list[list[Any]]:
        self.buckets += [len(bucket) for bucket in buckets]
        return [
            [mine + other for mine, other in zip(bucket, self._gradients(bucket), strict=True)]
            for bucket in buckets
        ]

    def concat_rows(self, tensor: Any, name: str) -> Any:
        return tf.concat([tensor] * self.size, 0)


class Recorder(Events):
    """Keeps every decision."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, **values})

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]

    def epochs(self, kind: str) -> list[int]:
        return [event["epoch"] for event in self.events if event["kind"] == kind]
