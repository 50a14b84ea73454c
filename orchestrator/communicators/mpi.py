"""MPI: the ranks that `mpiexec` starts. The only file that imports `mpi4py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.communicators.base import Op


class MPICommunicator:
    """Collectives by mpi4py on host memory, on a communicator of our own.

    Raises:
        ImportError: mpi4py or the MPI library is missing.
    """

    name = "mpi"

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except Exception as error:
            raise ImportError(
                f"backend='mpi' needs mpi4py and an MPI library, and importing them failed: "
                f"{error}. Install them with `pip install 'keras-orchestrator[mpi]'`."
            ) from error
        self._mpi = MPI
        self._world = MPI.COMM_WORLD.Dup()
        # Gradients travel on their own communicator: they are sent from TensorFlow's threads.
        self._gradients = MPI.COMM_WORLD.Dup()
        self._ops = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
        host = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.rank: int = self._world.rank
        self.size: int = self._world.size
        self.local_rank: int = host.rank
        self.local_size: int = host.size

    def allreduce(self, array: np.ndarray, op: Op = "sum") -> np.ndarray:
        """One MPI_Allreduce."""
        array = np.array(array, order="C")  # ascontiguousarray would give a scalar an axis
        result = np.empty_like(array)
        self._world.Allreduce(array, result, self._ops[op])
        return result

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """One MPI_Bcast of the bytes."""
        result = np.array(array, order="C")
        self._world.Bcast(result.reshape(-1).view(np.uint8), root)
        return result

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """One pickled broadcast (mpi4py sends its length first)."""
        return self._world.bcast(obj, root)

    def allgather_object(self, obj: Any) -> list[Any]:
        """One pickled allgather."""
        return self._world.allgather(obj)

    def barrier(self) -> None:
        """One MPI_Barrier."""
        self._world.Barrier()

    def abort(self, code: int) -> None:
        """Ends every rank at once with `code` (MPI_Abort)."""
        sys.stdout.flush()
        sys.stderr.flush()
        # MPI_Abort ends the launcher too, which must have forwarded what was printed by then.
        time.sleep(1.0)
        self._mpi.COMM_WORLD.Abort(code)

    def _sum(self, flat: np.ndarray) -> np.ndarray:
        result = np.empty_like(flat)
        self._gradients.Allreduce(flat, result, self._mpi.SUM)
        return result

    def sum_gradients(self, buckets: Sequence[Sequence[tf.Tensor]]) -> list[list[tf.Tensor]]:
        """One MPI_Allreduce a bucket, of the tensors laid end to end.

        Half precision is summed as float32: MPI has no such type.
        """
        return [self._sum_bucket(list(bucket)) for bucket in buckets]

    def _sum_bucket(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        wire = tf.float64 if any(t.dtype == tf.float64 for t in tensors) else tf.float32
        flat = tf.concat([tf.reshape(tf.cast(t, wire), [-1]) for t in tensors], 0)
        summed = tf.ensure_shape(tf.numpy_function(self._sum, [flat], wire), flat.shape)
        parts = tf.split(summed, [tf.size(t) for t in tensors], num=len(tensors))
        return [
            tf.cast(tf.reshape(part, tf.shape(t)), t.dtype)
            for part, t in zip(parts, tensors, strict=True)
        ]
