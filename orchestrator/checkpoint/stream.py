"""A file written from front to back, hashed meanwhile in a second thread."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PIECE_BYTES = 8 * 2**20


class HashedFile:
    """A binary file that cannot seek; on leaving its `with` block it is on the disk and hashed.

    What is written is hashed from where it lies, with no copy, later than `write` returns: leave
    it unchanged until the block is left. fsync runs beside the hashing too.

    Attributes:
        digest: SHA-256 of the whole file, 64 hexadecimal digits; empty until the block is left.
    """

    def __init__(self, path: str) -> None:
        self.digest = ""
        self._file = open(path, "wb")  # noqa: SIM115 - closed in __exit__
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash")
        self._pending: list[Future[None]] = []

    def write(self, data: Any) -> int:
        """Appends anything that lies in memory in one piece; returns its number of bytes."""
        memory = memoryview(data)
        if memory.nbytes == 0:
            return 0
        memory = memory.cast("B")
        for start in range(0, memory.nbytes, PIECE_BYTES):
            piece = memory[start : start + PIECE_BYTES]
            self._pending.append(self._thread.submit(self._hash.update, piece))
            self._file.write(piece)
        return memory.nbytes

    def flush(self) -> None:
        """Part of what `zipfile` asks of a file."""
        self._file.flush()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            with self._file:
                if error is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    for update in self._pending:
                        update.result()
                    self.digest = self._hash.hexdigest()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._pending.clear()
