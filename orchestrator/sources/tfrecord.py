"""TFRecord files, read by record."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.sources.base import in_order, read_by_python
from orchestrator.sources.files import FileSet

# A record is its length, the length's checksum, the data and the data's checksum, all little
# endian (tensorflow/core/lib/io/record_writer.h).
_HEAD = struct.Struct("<QI")
_TAIL = struct.Struct("<I")


class TFRecordFiles:
    """TFRecord files on any fsspec filesystem, for `Runtime.shard`.

    Each rank looks through its share of the files for where records begin, and the ranks tell
    each other; then a rank reads the bytes of its own records and no others. Every checksum of
    what is read is verified. Files must not be compressed as a whole (what is in a record may).

    Args:
        urls: A URL or local path, with `*` a pattern; or a list of them. The samples' order is
            that of the list, and sorted by name within a pattern.
        parse: A TensorFlow function from one record (a scalar string tensor) to a sample, in any
            nesting of tuples and dicts, with shapes known while it is traced. By default a
            sample is the record's bytes.

    Raises:
        FileNotFoundError: A pattern fits no file.
        ImportError: google-crc32c is missing.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        parse: Callable[[tf.Tensor], Any] | None = None,
    ) -> None:
        self._checksum = _checksum_function()
        self._files = FileSet(urls)
        self._parse = None if parse is None else tf.function(parse)

    def describe(self) -> str:
        """The files' names."""
        return f"TFRecords of {self._files.describe()}"

    def scan(self, rank: int, size: int) -> dict[int, np.ndarray]:
        """The records' lengths in bytes, by the number of the file.

        Raises:
            ValueError: A file is cut, damaged, compressed or no TFRecord file.
        """
        return {file: self._lengths(file) for file in self._files.share(rank, size)}

    def _lengths(self, file: int) -> np.ndarray:
        path, lengths, position = self._files.paths[file], [], 0
        end = self._files.fs.size(path)
        with self._files.fs.open(path, "rb") as opened:
            while position < end:
                opened.seek(position)
                head = opened.read(_HEAD.size)
                if len(head) == _HEAD.size:
                    length, checksum = _HEAD.unpack(head)
                    if self._checksum(head[:8]) != checksum:
                        raise ValueError(
                            f"{path} has no TFRecord at byte {position} (the length's checksum is "
                            "wrong): it is damaged, compressed or another kind of file."
                        )
                    lengths.append(length)
                    position += _HEAD.size + length + _TAIL.size
                if len(head) < _HEAD.size or position > end:
                    raise ValueError(
                        f"{path} is cut: its last TFRecord, number {len(lengths)}, would end "
                        f"after the file's {end} bytes."
                    )
        return np.array(lengths, "int64")

    def join(self, found: Sequence[Mapping[int, np.ndarray]]) -> _Records:
        """The records of all files, given every rank's `scan`."""
        by_file = {file: lengths for share in found for file, lengths in share.items()}
        lengths = [by_file[file] for file in range(len(self._files.paths))]
        return _Records(self._files, lengths, self._checksum, self._parse)


class _Records:
    """A `Source` of records whose lengths are known."""

    note: str | None = None

    def __init__(
        self,
        files: FileSet,
        lengths: list[np.ndarray],
        checksum: Callable[[bytes], int],
        parse: Callable[[tf.Tensor], Any] | None,
    ) -> None:
        self._files, self._checksum, self._parse = files, checksum, parse
        sizes = [each + _HEAD.size + _TAIL.size for each in lengths]
        self._sizes = np.concatenate(sizes)
        self._begins = np.concatenate([np.cumsum(each) - each for each in sizes])
        self._file_of = np.repeat(np.arange(len(lengths), dtype="int32"), list(map(len, lengths)))
        self._spec = tf.TensorSpec([], tf.string) if parse is None else _spec_of(parse)

    def __len__(self) -> int:
        return len(self._sizes)

    def describe(self) -> str:
        """What a sample is."""
        return str(self._spec)

    def rows(self, indices: tf.Tensor) -> Any:
        """The samples at `indices`, stacked."""
        (records,) = read_by_python(self._read, [tf.TensorSpec([None], tf.string)], indices)
        if self._parse is None:
            return records
        return tf.map_fn(self._parse, records, fn_output_signature=self._spec)

    def _read(self, indices: np.ndarray) -> list[np.ndarray]:
        return [in_order(self._read_ascending, indices)]

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        files, begins = self._file_of[indices], self._begins[indices]
        places = list(
            zip(
                files.tolist(),
                begins.tolist(),
                (begins + self._sizes[indices]).tolist(),
                strict=True,
            )
        )
        records = np.empty(len(indices), object)
        for number, (place, framed) in enumerate(
            zip(places, self._files.read(places), strict=True)
        ):
            data = framed[_HEAD.size : -_TAIL.size]
            if self._checksum(data) != _TAIL.unpack(framed[-_TAIL.size :])[0]:
                raise ValueError(
                    f"{self._files.paths[place[0]]}: the TFRecord at byte {place[1]} is damaged "
                    "(its checksum is wrong)."
                )
            records[number] = data
        return records


def _spec_of(parse: Callable[[tf.Tensor], Any]) -> Any:
    spec = tf.data.Dataset.from_tensors("").map(parse).element_spec
    if not all(leaf.shape.is_fully_defined() for leaf in tf.nest.flatten(spec)):
        raise ValueError(
            "TFRecordFiles(parse=...) must give samples whose shapes are known while it is "
            f"traced, got {spec}. Set them with tf.ensure_shape, after a resize for instance."
        )
    return spec


def _checksum_function() -> Callable[[bytes], int]:
    try:
        import google_crc32c
    except ImportError:
        raise ImportError(
            "TFRecordFiles verifies checksums with google-crc32c: pip install google-crc32c"
        ) from None

    def masked(data: bytes) -> int:
        crc = google_crc32c.value(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    return masked
