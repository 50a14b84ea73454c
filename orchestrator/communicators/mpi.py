"""MPI: the ranks that `mpiexec` starts. The only file that imports `mpi4py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.communicators.base import Op, Wire


def build() -> dict[str, str]:
    """The MPI `library` that mpi4py loads and the `standard` it follows.

    Loads it; does not communicate. In a process whose ranks have not joined it does not begin MPI,
    and `MPICommunicator` can then no longer be made there.

    Raises:
        ImportError: mpi4py or the MPI library is missing.
    """
    try:
        if "mpi4py.MPI" not in sys.modules:
            import mpi4py

            mpi4py.rc.initialize = False  # without its launcher an MPI may end the process
        from mpi4py import MPI
    except Exception as error:
        raise ImportError(f"importing mpi4py failed: {error}") from error
    # MPICH's goes on for a page.
    library = " ".join(MPI.Get_library_version().splitlines()[0].replace("Version:", "").split())
    return {"library": library, "standard": ".".join(map(str, MPI.Get_version()))}


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
        self._half_sums: dict[np.dtype, Any] = {}
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

    def lost(self, error: BaseException) -> bool:
        """By its words (ULFM's): most MPIs end all ranks before any could raise this."""
        return any(words in str(error) for words in ("PROC_FAILED", "ERR_REVOKED"))

    def _sum(self, flat: np.ndarray) -> np.ndarray:
        result = np.empty_like(flat)
        if flat.dtype.itemsize == 2:
            mine, whole = flat.view(np.uint16), result.view(np.uint16)
            self._gradients.Allreduce(mine, whole, self._half_sum(flat.dtype))
        else:
            self._gradients.Allreduce(flat, result, self._mpi.SUM)
        return result

    def _half_sum(self, dtype: np.dtype) -> Any:
        """MPI's sum for a half precision, which it does not know as a type."""
        if dtype not in self._half_sums:

            def add(mine: Any, result: Any, _: Any) -> None:
                total = np.frombuffer(result, dtype)
                total += np.frombuffer(mine, dtype)

            self._half_sums[dtype] = self._mpi.Op.Create(add, commute=True)
        return self._half_sums[dtype]

    def sum_gradients(
        self, buckets: Sequence[Sequence[tf.Tensor]], name: str, wire: Wire | None = None
    ) -> list[list[tf.Tensor]]:
        """One MPI_Allreduce a bucket, of the tensors laid end to end."""
        return [self._sum_bucket(list(bucket), wire) for bucket in buckets]

    def _sum_bucket(self, tensors: list[tf.Tensor], wire: Wire | None) -> list[tf.Tensor]:
        kind = tf.float64 if any(t.dtype == tf.float64 for t in tensors) else tf.float32
        kind = {"fp16": tf.float16, "bf16": tf.bfloat16}[wire] if wire else kind
        flat = tf.concat([tf.reshape(tf.cast(t, kind), [-1]) for t in tensors], 0)
        summed = tf.ensure_shape(tf.numpy_function(self._sum, [flat], kind), flat.shape)
        parts = tf.split(summed, [tf.size(t) for t in tensors], num=len(tensors))
        return [
            tf.cast(tf.reshape(part, tf.shape(t)), t.dtype)
            for part, t in zip(parts, tensors, strict=True)
        ]

    def concat_rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """One MPI_Allgather of the lengths, one MPI_Allgatherv of the bytes."""

        def gather(rows: np.ndarray) -> np.ndarray:
            mine = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
            sizes = self._gradients.allgather(mine.size)
            whole = np.empty(sum(sizes), np.uint8)
            self._gradients.Allgatherv(mine, (whole, sizes))
            return whole.view(rows.dtype).reshape(-1, *rows.shape[1:])

        rows = tf.numpy_function(gather, [tensor], tensor.dtype)
        return tf.ensure_shape(rows, [None, *tensor.shape[1:]])
