"""Every rank's parts of some data, and a filesystem that counts what is read."""

from __future__ import annotations

from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import tensorflow as tf
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.data import shard
from tests.distributed import threads


def datasets(data: Any, size: int, **options: Any) -> list[Any]:
    """What `shard` gives to each rank; `data` may be a function that makes them for a rank."""

    def of_rank(communicator: threads.ThreadCommunicator) -> Any:
        return shard(data() if callable(data) else data, communicator, **options)

    return threads.run(size, of_rank)


def batches(dataset: Any) -> list[Any]:
    """One pass."""
    return list(dataset.as_numpy_iterator())


def put_together(ranks: list[list[Any]]) -> list[Any]:
    """The global batches that the ranks' parts make, none of them larger than the first."""
    assert len({len(own) for own in ranks}) == 1, "every rank makes as many steps"
    whole = []
    for pieces in zip(*ranks, strict=True):
        counts = [len(tf.nest.flatten(piece)[0]) for piece in pieces]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] - counts[-1] <= 1
        whole.append(tf.nest.map_structure(lambda *leaves: np.concatenate(leaves), *pieces))
    return whole


def global_batches(data: Any, size: int, **options: Any) -> list[Any]:
    """One pass of every rank, put together."""
    return put_together([batches(each) for each in datasets(data, size, **options)])


def alike(ours: Any, theirs: Any) -> None:
    """Same nesting, dtypes and values."""
    tf.nest.assert_same_structure(ours, theirs)
    for one, other in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


def refused_on_all(size: int, data: Any, message: str) -> None:
    """`shard` refuses the data on every rank with this message, and no rank waits for another."""

    def told(communicator: threads.ThreadCommunicator) -> list[Any]:
        with pytest.raises(ValueError, match=message):
            shard(data, communicator, batch_size=2)
        return communicator.allgather_object("alive")

    assert threads.run(size, told) == [["alive"] * size] * size


class CountedFileSystem(MemoryFileSystem):
    """Files in memory, at `counted://`; `read` holds the bytes of each reading."""

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}  # all instances share one, as in the base class
    pseudo_dirs: ClassVar[list[str]] = [""]
    read: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return "/" + path.removeprefix("counted://").strip("/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        return _CountedFile(file) if mode == "rb" else file

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        data = super().cat_file(path, *args, **options)
        self.read.append(len(data))
        return data

    @classmethod
    def bytes_read(cls) -> int:
        """Since this was called before."""
        count = sum(cls.read)
        cls.read.clear()
        return count


class _CountedFile:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _CountedFile:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.seek(0)

    def read(self, *size: int) -> bytes:
        data = self._file.read(*size)
        CountedFileSystem.read.append(len(data))
        return data


fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
