""".npz files, read by row."""

from __future__ import annotations

import functools
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from orchestrator.sources.base import in_order, read_by_python, runs
from orchestrator.sources.files import FileSet


class Member(NamedTuple):
    """One array in one file.

    Attributes:
        dtype: As NumPy writes it, with the byte order.
        shape: The first axis is the samples.
        begin: Where its rows begin in the file, in bytes; `None` where they can't be read singly.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int | None


_READ_WHOLE = (
    "{} array(s) in .npz files are compressed or in Fortran order, so every rank reads them whole "
    "and keeps them in memory; files of np.savez with arrays in C order are read by rows."
)


class NpzFiles:
    """`.npz` files on any fsspec filesystem, for `Runtime.shard`.

    Each file holds arrays by name, with one first dimension; the files follow each other. Each
    rank looks into its share of the files, and the ranks tell each other what is where; then a
    rank reads the bytes of its own rows. Files of `np.savez_compressed` (and arrays in Fortran
    order) can't be read so: every rank reads those arrays whole and keeps them in memory.

    Args:
        urls: A URL or local path, with `*` a pattern; or a list of them. The samples' order is
            that of the list, and sorted by name within a pattern.
        select: The names of the arrays to read: a sample is a tuple of them, in this order, such
            as `("x", "y")`. By default a sample is a dict of all arrays.

    Raises:
        FileNotFoundError: A pattern fits no file.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        select: Sequence[str] | None = None,
    ) -> None:
        self._files = FileSet(urls)
        self._select = None if select is None else tuple(select)

    def describe(self) -> str:
        """The files' names and what is selected."""
        return f"{self._select or 'all'} arrays of {self._files.describe()}"

    def scan(self, rank: int, size: int) -> dict[int, dict[str, Member]]:
        """What is in each file, by the number of the file.

        Raises:
            ValueError: An array is missing, or is one of Python objects.
        """
        return {file: self._members(file) for file in self._files.share(rank, size)}

    def _members(self, file: int) -> dict[str, Member]:
        path = self._files.paths[file]
        with self._files.fs.open(path, "rb", block_size=2**16) as opened:
            try:
                archive = zipfile.ZipFile(opened)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} is no .npz file, or is cut: {error}.") from None
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = set(self._select or infos) - set(infos)
            if missing:
                raise ValueError(f"{path} has no {sorted(missing)}; it has {sorted(infos)}.")
            return {
                name: _member(path, opened, archive, infos[name])
                for name in self._select or sorted(infos)
            }

    def join(self, found: Sequence[Mapping[int, dict[str, Member]]]) -> _Rows:
        """The rows of all files, given every rank's `scan`.

        Raises:
            ValueError: The files' arrays differ in name, dtype or shape, or a file's in length.
        """
        by_file = {file: members for share in found for file, members in share.items()}
        members = [by_file[file] for file in range(len(self._files.paths))]
        for path, here in zip(self._files.paths, members, strict=True):
            lengths = {member.shape[:1] for member in here.values()}
            if len(lengths) != 1 or lengths == {()}:
                raise ValueError(
                    f"{path} must hold arrays of as many samples, got {_shapes(here)}."
                )
            if _kinds(here) != _kinds(members[0]):
                raise ValueError(
                    f"{path} holds {_kinds(here)}, and {self._files.paths[0]} "
                    f"{_kinds(members[0])}: all files must hold the same arrays."
                )
        return _Rows(self._files, members, self._select)


class _Rows:
    """A `Source` of rows whose places are known."""

    def __init__(
        self,
        files: FileSet,
        members: list[dict[str, Member]],
        select: tuple[str, ...] | None,
    ) -> None:
        self._files, self._members, self._select = files, members, select
        self._names = list(members[0])
        lengths = [here[self._names[0]].shape[0] for here in members]
        self._ends = np.cumsum(lengths)
        self._specs = [
            tf.TensorSpec((None, *member.shape[1:]), np.dtype(member.dtype).newbyteorder("="))
            for member in members[0].values()
        ]
        self._whole = functools.cache(self._read_whole)
        whole = sum(m.begin is None for here in members for m in here.values())
        self.note = _READ_WHOLE.format(whole) if whole else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def describe(self) -> str:
        """One sample's dtypes and shapes."""
        return str(_kinds(self._members[0]))

    def rows(self, indices: tf.Tensor) -> Any:
        """The samples at `indices`, stacked."""
        rows = read_by_python(self._read, self._specs, indices)
        if self._select is not None:
            return tuple(rows)
        return dict(zip(self._names, rows, strict=True))

    def _read(self, indices: np.ndarray) -> list[np.ndarray]:
        return [
            in_order(functools.partial(self._read_ascending, name), indices).astype(
                spec.dtype.as_numpy_dtype, copy=False
            )
            for name, spec in zip(self._names, self._specs, strict=True)
        ]

    def _read_ascending(self, name: str, indices: np.ndarray) -> np.ndarray:
        first = self._members[0][name]
        dtype, row_shape = np.dtype(first.dtype), first.shape[1:]
        row = dtype.itemsize * int(np.prod(row_shape))
        rows = np.empty((len(indices), *row_shape), dtype)
        files = np.searchsorted(self._ends, indices, side="right")
        ranges, places, done = [], [], 0
        for file in np.unique(files).tolist():
            here = indices[files == file] - (self._ends[file] - self._members[file][name].shape[0])
            begin = self._members[file][name].begin
            if begin is None:
                rows[done : done + len(here)] = self._whole(file, name)[here]
            elif row:
                for start, end in runs(here):
                    ranges.append((file, begin + start * row, begin + end * row))
                    at = done + int(np.searchsorted(here, start))
                    places.append((at, at + end - start))
            done += len(here)
        for (start, end), block in zip(places, self._files.read(ranges), strict=True):
            rows[start:end] = np.frombuffer(block, dtype).reshape(end - start, *row_shape)
        return rows

    def _read_whole(self, file: int, name: str) -> np.ndarray:
        with (
            self._files.fs.open(self._files.paths[file], "rb") as opened,
            np.load(opened, allow_pickle=False) as archive,
        ):
            return archive[name]


def _member(path: str, opened: Any, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{path}: {info.filename} is of .npy version {version}, not 1 or 2.")
        shape, fortran, dtype = read_header(stream)
        header = stream.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{path}: {info.filename} is an array of Python objects, which only unpickling could "
            "read, and that runs code; save numbers or strings of a fixed length."
        )
    if info.compress_type != zipfile.ZIP_STORED or (fortran and len(shape) > 1):
        return Member(dtype.str, shape, None)
    # The file's own header may be longer than what the archive's directory says of it.
    opened.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", opened.read(4))
    begin = info.header_offset + 30 + name_length + extra_length + header
    return Member(dtype.str, shape, begin)


def _kinds(members: Mapping[str, Member]) -> dict[str, str]:
    return {name: f"{np.dtype(m.dtype)}{m.shape[1:]}" for name, m in members.items()}


def _shapes(members: Mapping[str, Member]) -> dict[str, tuple[int, ...]]:
    return {name: member.shape for name, member in members.items()}
