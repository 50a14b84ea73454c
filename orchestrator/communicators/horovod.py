"""Horovod: the ranks that `horovodrun` starts. The only file that imports `horovod`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.communicators.base import Op


class HorovodCommunicator:
    """Collectives by Horovod (Gloo on CPU, NCCL on GPU where it is built with it).

    Raises:
        ImportError: Horovod is missing or does not load beside this TensorFlow.
    """

    name = "horovod"

    def __init__(self) -> None:
        # One gradient bucket is one fused message and nothing joins it: where an element lies in
        # the message decides the order of its sum, which must not change from run to run.
        os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")
        try:
            import horovod.tensorflow as hvd
        except Exception as error:
            raise ImportError(
                "backend='horovod' needs Horovod built for the installed TensorFlow "
                f"{tf.__version__}, and importing it failed: {error}. Build it with "
                "`python tools/build_horovod` and install the wheel it prints, or start the "
                "ranks with `mpiexec` and backend='mpi'."
            ) from error
        hvd.init()
        self._hvd = hvd
        self._ops = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max}
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self.local_rank: int = hvd.local_rank()
        self.local_size: int = hvd.local_size()

    def allreduce(self, array: np.ndarray, op: Op = "sum") -> np.ndarray:
        """One Horovod allreduce on the host."""
        with tf.device("/CPU:0"):
            result = self._hvd.allreduce(
                tf.constant(array), op=self._ops[op], name="orchestrator.allreduce"
            )
        return np.array(result)  # .numpy() of a scalar is no array

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """One Horovod broadcast on the host."""
        with tf.device("/CPU:0"):
            result = self._hvd.broadcast(tf.constant(array), root, name="orchestrator.broadcast")
        return np.array(result)

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Two Horovod broadcasts: length and pickled bytes."""
        with tf.device("/CPU:0"):
            return self._hvd.broadcast_object(obj, root, name="orchestrator.object")

    def allgather_object(self, obj: Any) -> list[Any]:
        """Two Horovod allgathers: lengths and pickled bytes."""
        with tf.device("/CPU:0"):
            return self._hvd.allgather_object(obj, name="orchestrator.objects")

    def barrier(self) -> None:
        """One small allreduce."""
        self.allreduce(np.zeros(1, np.float32))

    def abort(self, code: int) -> None:
        """Ends this process with `code`; `horovodrun` then ends the other ranks."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def sum_gradients(self, buckets: Sequence[Sequence[tf.Tensor]]) -> list[list[tf.Tensor]]:
        """One grouped allreduce a bucket and dtype (Horovod groups have one dtype).

        Their names do not depend on the graph around them.
        """
        return [self._sum_bucket(index, list(bucket)) for index, bucket in enumerate(buckets)]

    def _sum_bucket(self, index: int, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        sums: dict[int, tf.Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            group = self._hvd.grouped_allreduce(
                [tensors[i] for i in places],
                op=self._hvd.Sum,
                name=f"orchestrator.gradients.{index}.{dtype.name}",
                ignore_name_scope=True,
            )
            sums.update(zip(places, group, strict=True))
        return [sums[i] for i in range(len(tensors))]
