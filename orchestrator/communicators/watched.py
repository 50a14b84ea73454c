"""A communicator whose waits are on record, so that one that never ends can be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.communicators.base import Communicator, Op, Wire
from orchestrator.waits import Waits

if TYPE_CHECKING:
    import tensorflow as tf


class WatchedCommunicator:
    """Another communicator, with each of its Python collectives noted in `waits`.

    What stands in a graph is not: `Steps` notes the training step around it.

    Args:
        inner: Does the work.
        waits: Where it is noted.
    """

    def __init__(self, inner: Communicator, waits: Waits) -> None:
        self.inner = inner
        self.waits = waits
        self.name = inner.name
        self.rank, self.size = inner.rank, inner.size
        self.local_rank, self.local_size = inner.local_rank, inner.local_size

    def allreduce(self, array: np.ndarray, op: Op = "sum") -> np.ndarray:
        """As the inner one's."""
        with self.waits.on("allreduce"):
            return self.inner.allreduce(array, op)

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """As the inner one's."""
        with self.waits.on("broadcast"):
            return self.inner.broadcast(array, root)

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """As the inner one's."""
        with self.waits.on("broadcast_object"):
            return self.inner.broadcast_object(obj, root)

    def allgather_object(self, obj: Any) -> list[Any]:
        """As the inner one's."""
        with self.waits.on("allgather_object"):
            return self.inner.allgather_object(obj)

    def barrier(self) -> None:
        """As the inner one's."""
        with self.waits.on("barrier"):
            self.inner.barrier()

    def abort(self, code: int) -> None:
        """As the inner one's."""
        self.inner.abort(code)

    def lost(self, error: BaseException) -> bool:
        """As the inner one's."""
        return self.inner.lost(error)

    def sum_gradients(
        self, buckets: Sequence[Sequence[tf.Tensor]], name: str, wire: Wire | None = None
    ) -> list[list[tf.Tensor]]:
        """As the inner one's."""
        return self.inner.sum_gradients(buckets, name, wire)

    def concat_rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """As the inner one's."""
        return self.inner.concat_rows(tensor, name)
