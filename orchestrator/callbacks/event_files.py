"""The event files of one run in TensorBoard's folder: put on any filesystem, cut back on resume."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from orchestrator import storage
from orchestrator.retries import Retry


class EventFiles:
    """Files that TensorFlow writes on a local disk; rank 0 has them. Does not communicate.

    Several runs may share a folder: a run's own files carry its name.

    Args:
        url: The folder, a local path or any fsspec URL.
        run: The run's name, in the names of its files.

    Attributes:
        sizes: Bytes of each file of the run when last put, by its path in the folder.
    """

    def __init__(self, url: str, run: str) -> None:
        self._url = url
        self.run = run
        self.sizes: dict[str, int] = {}
        self._spool: Path | None = None
        self._local: Path | None = None
        self._sent: dict[str, tuple[int, int]] = {}

    @property
    def suffix(self) -> str:
        """How the names of the run's files end."""
        return f".{self.run}.v2"

    def folder(self) -> str:
        """Where TensorFlow is to write: the folder itself, or one whose files are put there."""
        fs, path = storage.resolve(self._url)
        if isinstance(fs, LocalFileSystem):
            self._local = Path(path)
        elif self._spool is None:
            self._local = self._spool = Path(tempfile.mkdtemp(prefix="tensorboard-"))
            weakref.finalize(self, shutil.rmtree, self._spool, ignore_errors=True)
        return str(self._local)

    def put(self) -> None:
        """Puts what has changed, once the writers are flushed."""
        if self._local is None:
            return
        for path in sorted(self._local.rglob("*" if self._spool else f"*{self.suffix}")):
            if not path.is_file():
                continue
            name = path.relative_to(self._local).as_posix()
            status = path.stat()
            if self._spool and self._sent.get(name) != (status.st_size, status.st_mtime_ns):
                storage.replace(self._at(name), lambda to, path=path: _copy(path, to))
                self._sent[name] = status.st_size, status.st_mtime_ns
            if name.endswith(self.suffix):
                self.sizes[name] = status.st_size

    def rewind(self, sizes: dict[str, int]) -> None:
        """Cuts the run's files to the lengths they had, and removes those of later."""
        fs, root = storage.resolve(self._url)
        retry = Retry()
        for path in retry(f"listing {self._url}", lambda: fs.find(root)):
            name = os.path.relpath(path, root)
            if not name.endswith(self.suffix):
                continue
            if name not in sizes:
                storage.remove(self._at(name))
            elif fs.size(path) > sizes[name]:
                begin = retry(
                    f"reading {path}", lambda path=path, end=sizes[name]: fs.cat_file(path, 0, end)
                )
                storage.replace(self._at(name), lambda to, begin=begin: _write(to, begin))
        self.sizes = dict(sizes)

    def _at(self, name: str) -> str:
        return storage.join(self._url, name)


def _copy(path: Path, target: str) -> None:
    shutil.copyfile(path, target)


def _write(target: str, content: bytes) -> None:
    with open(target, "wb") as file:
        file.write(content)
