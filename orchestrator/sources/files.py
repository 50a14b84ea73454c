"""Files on any fsspec filesystem, and ranges of their bytes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence

import fsspec
from fsspec.implementations.local import LocalFileSystem

from orchestrator import storage

Range = tuple[int, int, int]  # the file's number, the first byte, the one after the last


class FileSet:
    """Files of one filesystem, in an order that all ranks agree on.

    Args:
        urls: A URL or local path, with `*` a pattern; or several of them. What a pattern gives
            is sorted; several are taken in their order.

    Raises:
        ValueError: They lie on several filesystems, or there are none.
        FileNotFoundError: A pattern fits no file.
    """

    def __init__(self, urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        several = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
        resolved = [storage.resolve(os.fspath(url)) for url in several]
        if not resolved or len({type(fs) for fs, _ in resolved}) > 1:
            raise ValueError(
                f"Expected the URLs of one or more files on one filesystem, got {several}."
            )
        self.fs: fsspec.AbstractFileSystem = resolved[0][0]
        self.paths: list[str] = []
        for _, path in resolved:
            found = sorted(map(str, self.fs.glob(path))) if "*" in path else [path]
            if not found:
                raise FileNotFoundError(f"No file fits the pattern {path}.")
            self.paths += found

    def share(self, rank: int, size: int) -> range:
        """The numbers of the files that a rank looks into."""
        return range(rank, len(self.paths), size)

    def describe(self) -> str:
        """The names; where they are many, some of them and a digest of all."""
        names = [os.path.basename(path) for path in self.paths]
        if len(names) <= 4:
            return f"{len(names)} file(s) {', '.join(names)}"
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
        return f"{len(names)} files {names[0]}, {names[1]} ... {names[-1]} (digest {digest})"

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, in order.

        Ranges that follow each other without a gap are read as one, so that samples in the
        files' own order cost one request a batch.
        """
        merged: list[Range] = []
        places: list[tuple[int, int, int]] = []
        for file, begin, end in ranges:
            if merged and merged[-1][0] == file and merged[-1][2] == begin:
                merged[-1] = (file, merged[-1][1], end)
            else:
                merged.append((file, begin, end))
            offset = begin - merged[-1][1]
            places.append((len(merged) - 1, offset, offset + end - begin))
        blocks = self._read_blocks(merged)
        return [blocks[number][begin:end] for number, begin, end in places]

    def _read_blocks(self, ranges: Sequence[Range]) -> list[bytes]:
        if not isinstance(self.fs, LocalFileSystem):
            paths = [self.paths[file] for file, _, _ in ranges]
            begins, ends = [b for _, b, _ in ranges], [e for _, _, e in ranges]
            blocks = self.fs.cat_ranges(paths, begins, ends, on_error="raise")
        else:
            blocks = self._read_local(ranges)
        for (file, begin, end), block in zip(ranges, blocks, strict=True):
            if len(block) != end - begin:
                raise OSError(
                    f"{self.paths[file]} ends too early: bytes {begin} to {end} were asked for and "
                    f"{len(block)} came. It has been changed or cut since it was looked into."
                )
        return blocks

    def _read_local(self, ranges: Sequence[Range]) -> list[bytes]:
        by_file: dict[int, list[int]] = defaultdict(list)
        for number, (file, _, _) in enumerate(ranges):
            by_file[file].append(number)
        blocks = [b""] * len(ranges)
        for file, numbers in by_file.items():
            with open(self.paths[file], "rb", buffering=0) as opened:
                for number in numbers:
                    _, begin, end = ranges[number]
                    blocks[number] = os.pread(opened.fileno(), end - begin, begin)
        return blocks
