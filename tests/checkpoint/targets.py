"""One place to save to in a test, and ways to look at it and to harm it behind the store's back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from orchestrator import storage
from orchestrator.checkpoint import manifest
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.retries import Retry
from tests.checkpoint.proxy import Fault
from tests.checkpoint.servers import Server

QUICK = Retry(budget=2.0, first=0.02, cap=0.1)


def content(data: bytes) -> Callable[[str], None]:
    """What writes these bytes."""

    def write(path: str) -> None:
        Path(path).write_bytes(data)

    return write


def files(seed: int, size: int = 3000) -> dict[str, Callable[[str], None]]:
    """Two files whose bytes follow from the step."""
    return {name: content(data) for name, data in expected(seed, size).items()}


def expected(seed: int, size: int = 3000) -> dict[str, bytes]:
    block = f"weights of step {seed:010d} ".encode()
    body = (block * (size // len(block) + 1))[:size]
    return {"model.weights.h5": body, "state.json": f'{{"step": {seed}}}'.encode()}


class Target:
    """A store's place.

    Attributes:
        kind: `local`, `memory`, `s3`, `moto` or `gcs`.
        url: The store's.
        options: Storage options.
        server: Where there is one.
    """

    server: Server | None = None

    def __init__(self, kind: str, url: str, tmp_path: Path, options: Mapping[str, Any]) -> None:
        self.kind = kind
        self.url = url
        self.options = dict(options)
        self.spool = tmp_path / "spool"
        self.spool.mkdir(parents=True, exist_ok=True)

    def store(self, retry: Retry = QUICK, **more: Any) -> CheckpointStore:
        """A store as a new process would make it."""
        return CheckpointStore(
            self.url, retry=retry, spool=str(self.spool), **{**self.options, **more}
        )

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return storage.resolve(self.url, self.options)[0]

    @property
    def root(self) -> str:
        return storage.resolve(self.url, self.options)[1]

    def paths(self) -> list[str]:
        """All files, relative to the store."""
        fs = self.fs
        fs.invalidate_cache()
        prefix = self.root.rstrip("/") + "/"
        # SeaweedFS keeps emptied folders for a while and shows them as objects.
        found = [path for path in fs.find(self.root) if path.startswith(prefix)]
        return sorted(path.removeprefix(prefix) for path in found)

    def read(self, path: str) -> bytes:
        return self.fs.cat_file(f"{self.root}/{path}")

    def put(self, path: str, data: bytes) -> None:
        if self.kind == "local":
            os.makedirs(os.path.dirname(f"{self.root}/{path}"), exist_ok=True)
        self.fs.pipe_file(f"{self.root}/{path}", data)

    def remove(self, path: str) -> None:
        self.fs.rm_file(f"{self.root}/{path}")

    def manifest_of(self, step: int) -> manifest.Manifest:
        return manifest.decode(self.read(f"{manifest.folder(step)}/manifest.json"), step)

    def data_path(self, step: int, name: str = "model.weights.h5") -> str:
        """Where a checkpoint's file lies."""
        found = self.manifest_of(step)
        (file,) = [file for file in found.files if file.name == name]
        return f"{manifest.folder(step)}/{found.path(file)}"

    def uploads(self) -> list[str]:
        """Unfinished multipart uploads below the store."""
        return []

    def leftovers(self) -> list[str]:
        """What is there beside the files that valid manifests name."""
        there = set(self.paths())
        for path in list(there):
            step = manifest.step_of(path.split("/")[0])
            if step is not None and path.endswith("/manifest.json"):
                found = self.manifest_of(step)
                there -= {path, *(f"{manifest.folder(step)}/{found.path(f)}" for f in found.files)}
        return sorted(there) + self.uploads() + os.listdir(self.spool)

    def close(self) -> None:
        pass


class LocalTarget(Target):
    """A folder."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__("local", str(tmp_path / "store"), tmp_path, {})

    def leftovers(self) -> list[str]:
        empty = [
            os.path.relpath(below, self.root)
            for below, folders, names in os.walk(self.root)
            if not folders and not names and below != self.root
        ]
        return super().leftovers() + empty


class MemoryTarget(Target):
    """A prefix of fsspec's memory."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__("memory", f"memory://checkpoints/{secrets.token_hex(4)}", tmp_path, {})

    def close(self) -> None:
        if self.fs.exists(self.root):
            self.fs.rm(self.root, recursive=True)


class RemoteTarget(Target):
    """A prefix of a server's bucket, which is reached through the proxy."""

    def __init__(self, kind: str, server: Server, tmp_path: Path) -> None:
        url = f"{server.url}/{secrets.token_hex(4)}/checkpoints"
        super().__init__(kind, url, tmp_path, server.options)
        self.server = server

    def fault(self, fault: Fault) -> None:
        """From now on the network does this."""
        assert self.server is not None
        self.server.proxy.set(fault)

    @property
    def hits(self) -> int:
        assert self.server is not None
        return self.server.proxy.hits

    def uploads(self) -> list[str]:
        assert self.server is not None
        if self.server.kind != "s3":
            return []
        bucket, _, prefix = self.root.partition("/")
        answer = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    def close(self) -> None:
        self.fault(Fault())
