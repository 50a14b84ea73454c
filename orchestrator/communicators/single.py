"""One process: every collective is the identity."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.communicators.base import Op, Wire

if TYPE_CHECKING:
    import tensorflow as tf


class SingleCommunicator:
    """The communicator of a world of one rank."""

    name = "single"
    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def allreduce(self, array: np.ndarray, op: Op = "sum") -> np.ndarray:
        """Returns a copy."""
        return np.array(array)

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """Returns a copy."""
        return np.array(array)

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Returns `obj`."""
        return obj

    def allgather_object(self, obj: Any) -> list[Any]:
        """Returns `[obj]`."""
        return [obj]

    def barrier(self) -> None:
        """Returns at once."""

    def abort(self, code: int) -> None:
        """Ends the process with `code`, without running exit handlers."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def lost(self, error: BaseException) -> bool:
        """There is no other."""
        return False

    def sum_gradients(
        self, buckets: Sequence[Sequence[tf.Tensor]], name: str, wire: Wire | None = None
    ) -> list[list[tf.Tensor]]:
        """Returns the tensors as they are."""
        return [list(bucket) for bucket in buckets]

    def concat_rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Returns the tensor."""
        return tensor
