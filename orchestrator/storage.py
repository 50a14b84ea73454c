"""Whole files on any fsspec filesystem. Nothing here communicates; whoever calls it is rank 0."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from orchestrator import jitter
from orchestrator.config import SettingError
from orchestrator.retries import Retry, code, status, transient

MIB = 2**20
PART = 16 * MIB
PARTS_IN_FLIGHT = 4
PREFLIGHT = ".preflight-"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# One part is tried a few times by the client, so that an upload is not begun anew for each
# hiccup; what lasts longer is `Retry`'s.
_S3 = {
    "use_listings_cache": False,
    "max_concurrency": PARTS_IN_FLIGHT,
    "default_block_size": PART,
    "config_kwargs": {
        "retries": {"max_attempts": 4, "mode": "standard"},
        "connect_timeout": 10,
        "read_timeout": 60,
        "tcp_keepalive": True,
    },
}
_GCS = {"use_listings_cache": False, "consistency": "md5", "requests_timeout": 300}


def resolve(
    url: str, options: Mapping[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and the path on it that a URL (or a plain local path) names.

    Args:
        url: Any fsspec URL, or a local path.
        options: For the filesystem, such as `endpoint_url`; they go before what is set here: for
            S3 parts of 16 MiB, four in flight, and few retries; for GCS checksums.

    Raises:
        SettingError: The package for this kind of URL is not installed, or knows no such option.
    """
    protocol = fsspec.utils.get_protocol(url)
    given = dict(options or {})
    if _EXTRAS.get(protocol) == "s3":
        config = {**_S3["config_kwargs"], **given.pop("config_kwargs", {})}
        given = {**_S3, **given, "config_kwargs": config}
    elif _EXTRAS.get(protocol) == "gcs":
        # Else gcsfs asks each bucket over gRPC for its kind, which an emulator never answers.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        given = {**_GCS, **given}
    try:
        if "://" in url:
            fs, path = fsspec.core.url_to_fs(url, **given)
        else:  # its name may hold "::", which chains filesystems in a URL
            fs = LocalFileSystem(**given)
            path = fs._strip_protocol(os.path.expanduser(url))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        package = f"keras-orchestrator[{extra}]" if extra else "the package that fsspec names"
        raise SettingError(
            f"{url}: what {protocol}:// needs is not installed ({error}). "
            f"Install it: pip install '{package}'"
        ) from None
    except (TypeError, ValueError) as error:
        raise SettingError(f"{url}: {error}") from error
    jitter.keep_apart()
    return fs, path


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, unless `name` is a URL or an absolute path of its own."""
    if "://" in name or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}"


def explain(error: Exception, url: str) -> Exception:
    """The usual mistakes as an error that says what to do; any other error as it is."""
    text = f"{url}: {type(error).__name__}: {error}."
    number = getattr(error, "errno", None)
    full = number in (errno.ENOSPC, errno.EDQUOT) or "errno = 28" in str(error)
    if full:
        return OSError(
            number or errno.ENOSPC, f"{text} The disk is full: free some of it, or keep fewer files"
        )
    if number == errno.EROFS:
        return SettingError(f"{text} Nothing can be written there; choose another place.")
    denied = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    if denied or status(error) in (401, 403):
        return SettingError(f"{text} Check the credentials, and what they may do there.")
    missing = isinstance(error, FileNotFoundError) and code(error) is None and number is None
    missing = missing and not transient(error)
    if (missing and fsspec.utils.get_protocol(url) in _EXTRAS) or code(error) == "NoSuchBucket":
        return SettingError(f"{text} There is no such bucket: make it, or correct the URL.")
    if isinstance(error, NotADirectoryError | FileExistsError) and os.path.exists(url):
        return SettingError(f"{text} A file is in the way of a folder; choose another place.")
    return error


@contextlib.contextmanager
def explained(url: str):
    """Errors of the usual mistakes are raised as `explain` has them."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        better = explain(error, url)
        if better is error:
            raise
        raise better from error


def preflight(
    url: str, options: Mapping[str, Any] | None = None, retry: Retry | None = None
) -> None:
    """Writes, reads and deletes a small object, so that a wrong target is known at the start.

    Args:
        url: The folder to try; on a disk it is made.
        options: For the filesystem.
        retry: For transient errors; by default within a minute.

    Raises:
        SettingError: No permission, no such bucket, a read-only disk; it says what to do.
        OSError: The target is full, cannot be reached, or gives back something else.
    """
    retry = retry or Retry()
    content = secrets.token_bytes(64)
    with explained(url):
        fs, folder = resolve(url, options)
        path = f"{folder.rstrip('/')}/{PREFLIGHT}{secrets.token_hex(8)}"
        if isinstance(fs, LocalFileSystem):
            os.makedirs(folder, exist_ok=True)
        retry(f"writing {path}", lambda: fs.pipe_file(path, content))
        try:
            back = retry(f"reading {path}", lambda: fs.cat_file(path))
        finally:
            with contextlib.suppress(FileNotFoundError):
                retry(f"deleting {path}", lambda: fs.rm_file(path))
    if back != content:
        raise OSError(errno.EIO, f"{url} gave back other bytes than were written: do not use it")


def replace(url: str, write: Callable[[str], None], retry: Retry | None = None) -> None:
    """Writes a file whole or not at all, replacing one of the same name.

    On a local disk: a temporary name in the same folder, fsync, rename, fsync of the folder.
    Elsewhere: a local temporary file, then one put, tried again after transient errors.

    Args:
        url: Where the file goes; missing folders are made.
        write: Called once with a local path of the same suffixes, which it writes.
        retry: For the put; by default within a minute.

    Raises:
        OSError: As the filesystem says; no partial file is left under either name.
    """
    fs, path = resolve(url)
    folder, name = os.path.split(path)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(folder, exist_ok=True)
        _replace_local(path, os.path.join(folder, _temporary(name)), write)
        return

    def put(local: str) -> None:
        fs.makedirs(folder, exist_ok=True)
        fs.put_file(local, path)

    with tempfile.TemporaryDirectory() as spool:
        local = os.path.join(spool, name)
        write(local)
        (retry or Retry())(f"writing {url}", lambda: put(local))


def _temporary(name: str) -> str:
    # Keras chooses the format by the suffix, so the temporary name keeps it.
    return f".tmp-{secrets.token_hex(4)}-{name}"


def _replace_local(path: str, temporary: str, write: Callable[[str], None]) -> None:
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, and a file is to be written there.")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync(os.path.dirname(path))


def sync(path: str) -> None:
    """Returns when a local file, or a folder's list of names, is on the disk (fsync)."""
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
    if Retry()(f"looking for {url}", lambda: fs.exists(path)):
        with contextlib.suppress(FileNotFoundError):  # a lost response: the first try removed it
            Retry()(f"removing {url}", lambda: fs.rm_file(path))


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
        self._url = url
        self._text = ""
        if not (keep and self._fs.exists(self._path)):
            write_text(url, "")
        elif not isinstance(self._fs, LocalFileSystem):
            self._text = self._fs.cat_file(self._path).decode()
        self.empty = self._fs.size(self._path) == 0

    def read(self) -> str:
        """All of it."""
        if isinstance(self._fs, LocalFileSystem):
            with open(self._path, encoding="utf-8") as file:
                return file.read()
        return self._text

    def replace(self, lines: Sequence[str]) -> None:
        """Puts other lines in place of all."""
        self._text = "".join(f"{line}\n" for line in lines)
        write_text(self._url, self._text)
        self.empty = not lines

    def append(self, line: str) -> None:
        """Adds one line."""
        self.empty = False
        if isinstance(self._fs, LocalFileSystem):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            self._text += line + "\n"
            text = self._text.encode()
            Retry()(f"writing {self._path}", lambda: self._fs.pipe_file(self._path, text))
