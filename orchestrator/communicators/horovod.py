"""Horovod: the ranks that `horovodrun` starts. The only file that imports `horovod`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.communicators.base import Op, Wire

# What Horovod (common/common.h), Gloo (in every path it names) and NCCL say of a rank that is gone.
_LOST = ("Horovod has been shut down", "gloo/transport/", "remote process exited")


def _load() -> Any:
    try:
        import horovod.tensorflow as hvd
    except Exception as error:
        raise ImportError(
            "backend='horovod' needs Horovod built for the installed TensorFlow "
            f"{tf.__version__}, and importing it failed: {error}. Build it with "
            "`python tools/build_horovod` and install the wheel it prints, or start the "
            "ranks with `mpiexec` and backend='mpi'."
        ) from error
    return hvd


def installed() -> dict[str, str] | None:
    """Horovod's `version` and the `tensorflow` it was built for; `None` where it is missing.

    Reads its files without loading it; does not communicate.
    """
    try:
        found = importlib.metadata.distribution("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None
    told = Path(str(found.locate_file("horovod/metadata.json")))
    built_for = json.loads(told.read_text()).get("tensorflow", "") if told.is_file() else ""
    return {"version": found.version, "tensorflow": str(built_for)}


def build() -> dict[str, bool]:
    """What Horovod was built with: `gloo`, `mpi`, `nccl`, `cuda`, `rocm`.

    Loads it, and does not begin it; does not communicate.

    Raises:
        ImportError: Horovod is missing or does not load beside this TensorFlow.
    """
    hvd = _load()
    parts = ("gloo", "mpi", "nccl", "cuda", "rocm")
    return {name: bool(getattr(hvd, f"{name}_built")()) for name in parts}


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
        hvd = _load()
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

    def lost(self, error: BaseException) -> bool:
        """By its words: an op of a graph raises TensorFlow's own kinds of error."""
        return any(words in str(error) for words in _LOST)

    def sum_gradients(
        self, buckets: Sequence[Sequence[tf.Tensor]], name: str, wire: Wire | None = None
    ) -> list[list[tf.Tensor]]:
        """One grouped allreduce a bucket and dtype (Horovod groups have one dtype).

        Their names do not depend on the graph around them. bf16, which Horovod cannot add, takes
        an alltoall and an allgather a bucket instead, and is summed in float32 between them.
        """
        names = [f"orchestrator.{name}.{index}" for index in range(len(buckets))]
        reduce = self._sum_in_bfloat16 if wire == "bf16" else self._sum_bucket
        return [
            reduce(named, list(bucket), wire) for named, bucket in zip(names, buckets, strict=True)
        ]

    def _sum_bucket(
        self, name: str, tensors: list[tf.Tensor], wire: Wire | None
    ) -> list[tf.Tensor]:
        sent = [tf.cast(t, tf.float16) if wire else t for t in tensors]
        sums: dict[int, tf.Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in sent):
            places = [i for i, tensor in enumerate(sent) if tensor.dtype == dtype]
            group = self._hvd.grouped_allreduce(
                [sent[i] for i in places],
                op=self._hvd.Sum,
                name=f"{name}.{dtype.name}",
                ignore_name_scope=True,
            )
            sums.update(zip(places, group, strict=True))
        return [tf.cast(sums[i], t.dtype) for i, t in enumerate(tensors)]

    def _sum_in_bfloat16(
        self, name: str, tensors: list[tf.Tensor], wire: Wire | None
    ) -> list[tf.Tensor]:
        flat = tf.concat([tf.reshape(tf.cast(t, tf.bfloat16), [-1]) for t in tensors], 0)
        length = tf.size(flat)
        share = -(-length // self.size)
        padded = tf.pad(flat, [[0, share * self.size - length]])
        # As float16 they only travel; nothing is calculated with them.
        own, _ = self._hvd.alltoall(
            tf.bitcast(padded, tf.float16),
            splits=tf.fill([self.size], share),
            name=f"{name}.alltoall",
            ignore_name_scope=True,
        )
        parts = tf.cast(tf.bitcast(tf.reshape(own, [self.size, share]), tf.bfloat16), tf.float32)
        mine = tf.cast(tf.reduce_sum(parts, 0), tf.bfloat16)
        whole = self.concat_rows(tf.bitcast(mine, tf.float16), f"{name}.allgather")
        summed = tf.cast(tf.bitcast(whole, tf.bfloat16)[:length], tf.float32)
        pieces = tf.split(summed, [tf.size(t) for t in tensors], num=len(tensors))
        return [
            tf.cast(tf.reshape(piece, tf.shape(t)), t.dtype)
            for piece, t in zip(pieces, tensors, strict=True)
        ]

    def concat_rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """One Horovod allgather."""
        return self._hvd.allgather(tensor, name=f"orchestrator.{name}", ignore_name_scope=True)
