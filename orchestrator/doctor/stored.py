"""Whether objects at a URL can be written, read, listed and deleted, and how fast."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator import storage
from orchestrator.doctor.report import Stored
from orchestrator.retries import Retry

STEPS = ("write", "read", "list", "delete")
# The clients try again by themselves as well; who waits here looks at a terminal.
_BUDGET_SECONDS = 10.0


def check(url: str, size: int = storage.MIB) -> Stored:
    """Tries an object of random bytes in the folder at a URL, and leaves nothing; on rank 0.

    Does not communicate, and does not raise: what went wrong stands in the result.

    Args:
        url: Any fsspec URL, or a local path, whose missing folders are made and removed again.
        size: Bytes, 1 MiB by default.
    """
    seconds: dict[str, float] = {}
    try:
        with storage.explained(url):
            _steps(url, size, seconds)
    except Exception as error:  # noqa: BLE001 - whatever a client raises is what is to be shown
        is_ours = isinstance(error, storage.SettingError)
        text = str(error) if is_ours else f"{type(error).__name__}: {error}"
        failed = next((step for step in STEPS if step not in seconds), "compare")
        return Stored(url=url, bytes=size, seconds=seconds, failed=failed, error=text)
    return Stored(url=url, bytes=size, seconds=seconds)


def _steps(url: str, size: int, seconds: dict[str, float]) -> None:
    fs, folder = storage.resolve(url)
    name = f"{storage.PREFLIGHT}{secrets.token_hex(8)}"
    path = f"{folder.rstrip('/')}/{name}"
    content = secrets.token_bytes(size)
    retry = Retry(budget=_BUDGET_SECONDS)

    def timed(step: str, operation: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = retry(f"{step} {path}", operation)
        seconds[step] = time.perf_counter() - begin
        return result

    is_local = isinstance(fs, storage.LocalFileSystem)
    with _folder(folder) if is_local else contextlib.nullcontext():
        try:
            timed("write", lambda: _write(fs, path, content, is_local))
            back = timed("read", lambda: fs.cat_file(path))
            names = timed("list", lambda: _names(fs, folder))
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(path)
            raise
        timed("delete", lambda: fs.rm_file(path))
    if back != content:
        raise OSError(errno.EIO, f"{url} gave back other bytes than were written: do not use it")
    if name not in names:
        raise OSError(errno.EIO, f"{url} does not list what was written: do not use it")


def _write(fs: Any, path: str, content: bytes, is_local: bool) -> None:
    fs.pipe_file(path, content)
    if is_local:  # else it is the speed of memory
        storage.sync(path)


def _names(fs: Any, folder: str) -> list[str]:
    fs.invalidate_cache()
    return [os.path.basename(str(path)) for path in fs.ls(folder, detail=False)]


@contextlib.contextmanager
def _folder(path: str) -> Iterator[None]:
    """Makes a local folder, and removes again what of it was not there."""
    new = []
    above = os.path.abspath(path)
    while not os.path.exists(above):
        new.append(above)
        above = os.path.dirname(above)
    try:
        os.makedirs(path, exist_ok=True)
        yield
    finally:
        for one in new:
            with contextlib.suppress(OSError):
                os.rmdir(one)
