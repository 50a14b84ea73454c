"""A store's files on S3, GCS and any other fsspec filesystem: no rename, conditional puts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import fsspec

from orchestrator.checkpoint import manifest
from orchestrator.checkpoint.local import (
    BrokenCheckpointError,
    Item,
    Writers,
    check,
    digest,
    write_one,
)
from orchestrator.retries import Retry, code, status
from orchestrator.storage import MIB, PART

SPOOL = "orchestrator-spool-"
_MOST_PARTS = 10_000
_TIMES = ("LastModified", "mtime", "updated", "created")


class ObjectPlace:
    """Checkpoints below a prefix of an object store.

    Args:
        fs: The filesystem.
        root: The prefix, as the filesystem writes it (`bucket/run/checkpoints`).
        retry: Around each whole operation.
        spool: A local folder for files on their way; the system's temporary one if `None`.
    """

    def __init__(
        self, fs: fsspec.AbstractFileSystem, root: str, retry: Retry, spool: str | None = None
    ) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self._retry = retry
        self._spool = spool or tempfile.gettempdir()
        protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
        self._kind = next((kind for kind in ("s3", "gcs") if kind in protocols), "other")

    def write(self, folder: str, token: str, files: Writers) -> tuple[manifest.File, ...]:
        """Has each data file written to the spool, hashes it, uploads it, removes it."""
        found = []
        with self._spooled() as spool:
            for name, write in files.items():
                local = os.path.join(spool, name)
                hashed = write_one(name, local, write)
                size = os.path.getsize(local)
                found.append(manifest.File(name, size, hashed or digest(local)))
                self._upload(local, f"{folder}/{token}/{name}", size)
                os.unlink(local)
        return tuple(found)

    def _upload(self, local: str, path: str, size: int) -> None:
        whole = self._full(path)
        options = {}
        if self._kind in ("s3", "gcs"):
            # Whole MiB: GCS wants multiples of 256 KiB.
            options["chunksize"] = max(PART, math.ceil(size / _MOST_PARTS / MIB) * MIB)

        def put() -> None:
            self.fs.put_file(local, whole, **options)
            arrived = self.fs.info(whole)["size"]
            if arrived != size:
                raise OSError(errno.EIO, f"{arrived} of {size} bytes arrived at {whole}")

        self._retry(f"uploading {whole}", put)

    def commit(self, folder: str, token: str, data: bytes) -> None:
        """Puts the manifest in one request, unless one is there.

        Raises:
            FileExistsError: The step has a manifest: another's, or this one if the answer to an
                earlier try got lost. The token in it tells.
        """
        path = self._full(f"{folder}/{manifest.NAME}")

        def put() -> None:
            try:
                self.fs.pipe_file(path, data, mode="create")
            except OSError as error:
                if code(error) == "PreconditionFailed" or status(error) == 412:
                    raise FileExistsError(errno.EEXIST, "the step has a manifest", path) from error
                if code(error) != "NotImplemented":
                    raise
                self._put_after_a_look(path, data)

        self._retry(f"committing {path}", put)

    def _put_after_a_look(self, path: str, data: bytes) -> None:
        # The store has no conditional put: two writers within one round trip are not told apart.
        try:
            self.fs.cat_file(path)
        except FileNotFoundError:
            self.fs.pipe_file(path, data)
        else:
            raise FileExistsError(errno.EEXIST, "the step has a manifest", path)

    def read(self, path: str) -> bytes:
        """A small object's content."""
        whole = self._full(path)
        return self._retry(f"reading {whole}", lambda: self.fs.cat_file(whole))

    def tree(self) -> dict[str, Item]:
        """All objects below the root, by their path relative to it, from one fresh listing."""

        def find() -> dict[str, Any]:
            self.fs.invalidate_cache()
            return self.fs.find(self.root, detail=True)

        listed = self._retry(f"listing {self.root}", find)
        prefix = self.fs._strip_protocol(self.root) + "/"
        return {
            path.removeprefix(prefix): Item(int(about["size"] or 0), _time(about))
            for path, about in listed.items()
            if path.startswith(prefix)
        }

    def verify(self, folder: str, found: manifest.Manifest) -> None:
        """Reads and hashes every file of a checkpoint, block by block.

        Raises:
            BrokenCheckpointError: One is not what the manifest says.
        """
        for file in found.files:
            path = self._full(f"{folder}/{found.path(file)}")
            try:
                size = self._retry(f"looking at {path}", lambda path=path: self.fs.size(path))
            except FileNotFoundError:
                raise BrokenCheckpointError(f"{file.name} is missing") from None
            if size != file.size:
                raise BrokenCheckpointError(f"{file.name} has {size} bytes instead of {file.size}")
            if self._digest(path, file.size) != file.sha256:
                raise BrokenCheckpointError(
                    f"{file.name} has other content than was saved (SHA-256)"
                )

    def _digest(self, path: str, size: int) -> str:
        running = hashlib.sha256()
        for start in range(0, size, PART):
            end = min(start + PART, size)
            running.update(
                self._retry(
                    f"reading {path}",
                    lambda start=start, end=end: self.fs.cat_file(path, start=start, end=end),
                )
            )
        return running.hexdigest()

    @contextlib.contextmanager
    def fetch(self, folder: str, found: manifest.Manifest) -> Iterator[str]:
        """A local folder with a checkpoint's verified files, removed at the end."""
        with self._spooled() as spool:
            for file in found.files:
                local = os.path.join(spool, file.name)
                os.makedirs(os.path.dirname(local), exist_ok=True)
                try:
                    self._download(f"{folder}/{found.path(file)}", local, file)
                except BrokenCheckpointError:
                    # What is at fault may be the way here: only twice the same is the file's own.
                    self._download(f"{folder}/{found.path(file)}", local, file)
            yield spool

    def _download(self, path: str, local: str, file: manifest.File) -> None:
        whole = self._full(path)
        try:
            self._retry(f"downloading {whole}", lambda: self.fs.get_file(whole, local))
        except FileNotFoundError:
            raise BrokenCheckpointError(f"{file.name} is missing") from None
        check(local, file)

    def delete(self, paths: Iterable[str]) -> None:
        """Removes objects, one after another."""
        for path in paths:
            whole = self._full(path)
            with contextlib.suppress(FileNotFoundError):
                self._retry(f"deleting {whole}", lambda whole=whole: self.fs.rm_file(whole))
        self.fs.invalidate_cache()

    def tidy(self, before: float) -> list[str]:
        """Removes dead writers' spools here and multipart uploads there, begun `before`.

        GCS ends its resumable uploads itself, after a week; they are nowhere listed.
        """
        removed = []
        for name in os.listdir(self._spool):
            path = os.path.join(self._spool, name)
            with contextlib.suppress(FileNotFoundError):
                about = os.stat(path)
                mine = name.startswith(SPOOL) and about.st_uid == os.getuid()
                if mine and about.st_mtime < before:
                    shutil.rmtree(path)
                    removed.append(path)
        return removed + (self._abort_uploads(before) if self._kind == "s3" else [])

    def _abort_uploads(self, before: float) -> list[str]:
        bucket, _, prefix = self.root.partition("/")
        removed, marker = [], {}
        while True:
            page = self._retry(
                f"listing uploads to {self.root}",
                lambda marker=marker: self.fs.call_s3(
                    "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **marker
                ),
            )
            for upload in page.get("Uploads", []):
                if upload["Key"].startswith(f"{prefix}/") and _stamp(upload["Initiated"]) < before:
                    which = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._abort(which)
                    removed.append(f"{upload['Key']} (multipart upload)")
            if not page.get("IsTruncated"):
                return removed
            marker = {
                "KeyMarker": page.get("NextKeyMarker", ""),
                "UploadIdMarker": page.get("NextUploadIdMarker", ""),
            }

    def _abort(self, which: dict[str, str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retry(
                f"aborting the upload of {which['Key']}",
                lambda: self.fs.call_s3("abort_multipart_upload", **which),
            )

    @contextlib.contextmanager
    def _spooled(self) -> Iterator[str]:
        os.makedirs(self._spool, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SPOOL, dir=self._spool) as spool:
            yield spool

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"


def _time(about: dict[str, Any]) -> float:
    stamps = [about[name] for name in _TIMES if about.get(name) is not None]
    # Of unknown age: never old enough to be removed.
    return _stamp(stamps[0]) if stamps else time.time()


def _stamp(stamp: Any) -> float:
    if isinstance(stamp, str):
        stamp = datetime.fromisoformat(stamp)
    return stamp.timestamp() if isinstance(stamp, datetime) else float(stamp)
