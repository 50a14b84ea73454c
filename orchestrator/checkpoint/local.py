"""A store's files on a local disk: fsync of all that counts, and a commit that replaces nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator import storage
from orchestrator.checkpoint import manifest

# What writes a file at a path, by the file's name. One that hashes while it writes gives back the
# SHA-256, which spares reading the file again.
Writers = Mapping[str, Callable[[str], str | None]]
# Not a name a data file can have.
_TEMPORARY = ".manifest"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Item:
    """A file as the store lists it.

    Attributes:
        size: In bytes.
        time: When it was last written, in seconds since 1970.
    """

    size: int
    time: float


class BrokenCheckpointError(Exception):
    """A checkpoint's files are not what its manifest says."""


def digest(path: str) -> str:
    """The SHA-256 of a local file, which is read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_one(name: str, path: str, write: Callable[[str], str | None]) -> str | None:
    """Has one file written at a local path, whose folder is made; returns what `write` does."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    hashed = write(path)
    if not os.path.isfile(path):
        raise ValueError(f"files[{name!r}] wrote no file at the path it was given, {path}")
    return hashed if isinstance(hashed, str) else None


def check(path: str, file: manifest.File) -> None:
    """Compares a local file with what the manifest says of it.

    Raises:
        BrokenCheckpointError: It is missing, has another size or other content.
    """
    try:
        size = os.path.getsize(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenCheckpointError(f"{file.name} is missing") from None
    if size != file.size:
        raise BrokenCheckpointError(f"{file.name} has {size} bytes instead of {file.size}")
    if digest(path) != file.sha256:
        raise BrokenCheckpointError(f"{file.name} has other content than was saved (SHA-256)")


class LocalPlace:
    """Checkpoints below a folder of a local disk.

    Args:
        root: The folder; made by the first save.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def write(self, folder: str, token: str, files: Writers) -> tuple[manifest.File, ...]:
        """Has the data files written in place; returns when all are on the disk."""
        home = os.path.join(self.root, folder, token)
        pending = []
        # Hashing and fsync both wait outside of Python, each for something else: side by side.
        with ThreadPoolExecutor(4) as pool:
            for name, write in files.items():
                path = os.path.join(home, name)
                hashed = write_one(name, path, write)
                hashing = None if hashed else pool.submit(digest, path)
                pending.append((name, path, hashed, hashing, pool.submit(storage.sync, path)))
            for *_, syncing in pending:
                syncing.result()
            found = tuple(
                manifest.File(name, os.path.getsize(path), hashed or hashing.result())
                for name, path, hashed, hashing, _ in pending
            )
        for below, _, _ in os.walk(home):
            storage.sync(below)
        storage.sync(os.path.join(self.root, folder))
        storage.sync(self.root)
        storage.sync(os.path.dirname(self.root))
        return found

    def commit(self, folder: str, token: str, data: bytes) -> None:
        """Gives the manifest its name, unless one is there.

        link(2) is a rename that refuses to replace. Where there are no links, a rename follows
        a look.

        Raises:
            FileExistsError: The step has a manifest.
        """
        temporary = os.path.join(self.root, folder, token, _TEMPORARY)
        target = os.path.join(self.root, folder, manifest.NAME)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.exists(target):
                raise FileExistsError(errno.EEXIST, "the step has a manifest", target) from None
            os.rename(temporary, target)
        storage.sync(os.path.join(self.root, folder))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)

    def read(self, path: str) -> bytes:
        """A small file's content."""
        with open(os.path.join(self.root, path), "rb") as file:
            return file.read()

    def tree(self) -> dict[str, Item]:
        """All files below the root, by their path relative to it."""
        found = {}
        for below, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(below, name)
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    about = os.lstat(path)
                    found[os.path.relpath(path, self.root)] = Item(about.st_size, about.st_mtime)
        return found

    def verify(self, folder: str, found: manifest.Manifest) -> None:
        """Hashes every file of a checkpoint.

        Raises:
            BrokenCheckpointError: One is not what the manifest says.
        """
        for file in found.files:
            check(os.path.join(self.root, folder, found.path(file)), file)

    @contextlib.contextmanager
    def fetch(self, folder: str, found: manifest.Manifest) -> Iterator[str]:
        """The folder of a checkpoint's verified files, where they lie."""
        self.verify(folder, found)
        yield os.path.join(self.root, folder, found.token)

    def delete(self, paths: Iterable[str]) -> None:
        """Removes files, and the folders that this empties, for good before it returns."""
        folders = set()
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.root, path))
            folders.add(os.path.dirname(path))
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                storage.sync(os.path.join(self.root, folder))
        for folder in folders:
            while folder and self._rmdir(folder):
                folder = os.path.dirname(folder)

    def tidy(self, before: float) -> list[str]:
        """Removes empty folders that were last changed `before`; returns what they were."""
        removed = []
        for below, _, _ in os.walk(self.root, topdown=False):
            path = os.path.relpath(below, self.root)
            with contextlib.suppress(FileNotFoundError):
                if path == "." or manifest.step_of(path.split(os.sep)[0]) is None:
                    continue
                if os.stat(below).st_mtime < before and self._rmdir(path):
                    removed.append(path)
        return removed

    def _rmdir(self, path: str) -> bool:
        try:
            os.rmdir(os.path.join(self.root, path))
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True
