"""Which samples are a rank's, and what it takes to be read by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf


def part(length: Any, rank: int, size: int) -> tuple[Any, Any]:
    """Where a rank's part of `length` samples begins, and how many it has.

    The parts are contiguous, in rank order, cover everything once and differ by at most one
    sample. Takes Python numbers or scalar tensors.
    """
    share, rest = length // size, length % size
    if isinstance(length, int):
        return rank * share + min(rank, rest), share + (rank < rest)
    return rank * share + tf.minimum(rest, rank), share + tf.cast(rank < rest, share.dtype)


class Source(Protocol):
    """Samples that can be read one by one, in any order.

    Attributes:
        note: What is read by more ranks than need it, in words for the user; `None` where every
            rank reads its own samples only.
    """

    note: str | None

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def describe(self) -> str:
        """One sample's dtypes and shapes: what must be alike on all ranks."""
        ...

    def rows(self, indices: tf.Tensor) -> Any:
        """The samples at `indices` (int64, one axis), stacked; called while a dataset is traced."""
        ...


@runtime_checkable
class Files(Protocol):
    """Files that must be looked into before their samples can be counted."""

    def describe(self) -> str:
        """The files' names: what must be alike on all ranks."""
        ...

    def scan(self, rank: int, size: int) -> Any:
        """Looks into this rank's share of the files; what it finds, to be sent to all ranks."""
        ...

    def join(self, found: Sequence[Any]) -> Source:
        """The samples, given what every rank found; the same on all ranks."""
        ...


def read_by_python(
    read: Callable[[np.ndarray], list[np.ndarray]], specs: Sequence[Any], indices: tf.Tensor
) -> list[tf.Tensor]:
    """Calls `read(indices)` inside a dataset; its arrays get the static shapes of `specs`."""
    tensors = tf.numpy_function(read, [indices], [spec.dtype for spec in specs])
    return [tf.ensure_shape(t, spec.shape) for t, spec in zip(tensors, specs, strict=True)]


def runs(indices: np.ndarray) -> list[tuple[int, int]]:
    """Ascending indices as `(begin, end)` of their unbroken runs."""
    if not len(indices):
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    begins = indices[np.concatenate([[0], breaks])]
    ends = indices[np.concatenate([breaks - 1, [len(indices) - 1]])] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def in_order(read: Callable[[np.ndarray], np.ndarray], indices: np.ndarray) -> np.ndarray:
    """Reads by ascending indices, and puts what comes into the order asked for."""
    order = np.argsort(indices, kind="stable")
    values = read(indices[order])
    result = np.empty_like(values)
    result[order] = values
    return result
