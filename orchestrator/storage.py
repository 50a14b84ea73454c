"""Whole files on any fsspec filesystem. Nothing here communicates; whoever calls it is rank 0."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable

import fsspec
from fsspec.implementations.local import LocalFileSystem


def resolve(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and the path on it that a URL (or a plain local path) names."""
    fs, path = fsspec.core.url_to_fs(os.path.expanduser(url))
    return fs, path


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, unless `name` is a URL or an absolute path of its own."""
    if "://" in name or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}"


def replace(url: str, write: Callable[[str], None]) -> None:
    """Writes a file whole or not at all, replacing one of the same name.

    On a local disk: a temporary name in the same folder, fsync, rename, fsync of the folder.
    Elsewhere: a local temporary file, then one put.

    Args:
        url: Where the file goes; missing folders are made.
        write: Called once with a local path of the same suffixes, which it writes.

    Raises:
        OSError: As the filesystem says; no partial file is left under either name.
    """
    fs, path = resolve(url)
    folder, name = os.path.split(path)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(folder, exist_ok=True)
        _replace_local(path, os.path.join(folder, _temporary(name)), write)
        return
    with tempfile.TemporaryDirectory() as spool:
        local = os.path.join(spool, name)
        write(local)
        fs.makedirs(folder, exist_ok=True)
        fs.put_file(local, path)


def _temporary(name: str) -> str:
    # Keras chooses the format by the suffix, so the temporary name keeps it.
    return f".tmp-{secrets.token_hex(4)}-{name}"


def _replace_local(path: str, temporary: str, write: Callable[[str], None]) -> None:
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, and a file is to be written there.")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    _sync(os.path.dirname(path))


def _sync(path: str) -> None:
    descriptor = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(url: str, text: str) -> None:
    """Writes a small UTF-8 file whole or not at all."""

    def write(path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    replace(url, write)


def remove(url: str) -> None:
    """Removes a file, if it is there."""
    fs, path = resolve(url)
    if fs.exists(path):
        fs.rm_file(path)


class Lines:
    """A text file that grows by lines.

    On a local disk a line is appended and flushed; elsewhere, where nothing can be appended
    portably, the file is put again whole.

    Attributes:
        empty: Whether the file holds nothing yet.
    """

    def __init__(self, url: str, *, keep: bool = False) -> None:
        """Starts the file anew, or with `keep` goes on at the end of one that is there."""
        self._fs, self._path = resolve(url)
        self._text = ""
        if not (keep and self._fs.exists(self._path)):
            write_text(url, "")
        elif not isinstance(self._fs, LocalFileSystem):
            self._text = self._fs.cat_file(self._path).decode()
        self.empty = self._fs.size(self._path) == 0

    def append(self, line: str) -> None:
        """Adds one line."""
        self.empty = False
        if isinstance(self._fs, LocalFileSystem):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            self._text += line + "\n"
            self._fs.pipe_file(self._path, self._text.encode())
