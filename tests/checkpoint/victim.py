"""Saves, prunes and is killed with SIGKILL at a chosen point; one fork an attempt.

`python -m tests.checkpoint.victim` reads one JSON line an attempt, forks, and answers with how
the child ended. Importing the clients takes a second, forking none; nothing here has a thread or
a connection before the fork. The child connects before its clock starts, so that the moments it
is killed at are moments of the save and of the prune.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import local, objects, saving
from orchestrator.checkpoint.retention import Last
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.retries import Retry

PART = 5 * 2**20  # the least that AWS and SeaweedFS take
ROOT = Path(__file__).resolve().parents[2]


class Points:
    """Counts the moments between and in writes, keeps them on file, dies at one of them.

    Args:
        path: Where the last point and whether the step is committed stand after the kill.
        die_at: The name of the point to die at and how many of that name come first; never if
            `None`.
    """

    def __init__(self, path: str, die_at: tuple[str, int] | None) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._die_at = die_at
        self._lock = threading.Lock()
        self.seen: list[str] = []
        self.phase = "start"
        self.committed = False

    def __call__(self, label: str) -> None:
        """One point."""
        with self._lock:
            name = f"{self.phase}: {label}"
            here = (name, self.seen.count(name))
            self.seen.append(name)
            record = json.dumps({"phase": name, "committed": self.committed})
            os.pwrite(self._file, record.ljust(200).encode(), 0)
            if here == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable, label: Callable[..., str]) -> Callable:
        """The function with a point before and one after it."""

        def wrapped(*args: Any, **named: Any) -> Any:
            self(f"before {label(*args, **named)}")
            result = function(*args, **named)
            self(f"after {label(*args, **named)}")
            return result

        return wrapped

    def around_async(self, function: Callable, label: Callable[..., str]) -> Callable:
        """The same for a coroutine."""

        async def wrapped(*args: Any, **named: Any) -> Any:
            self(f"before {label(*args, **named)}")
            result = await function(*args, **named)
            self(f"after {label(*args, **named)}")
            return result

        return wrapped


def watch(points: Points, place: Any) -> None:
    """Puts points around every system call or request that changes the store."""
    if isinstance(place, local.LocalPlace):
        for name in ("fsync", "link", "unlink", "rmdir", "makedirs"):
            setattr(os, name, points.around(getattr(os, name), lambda *_, n=name, **__: n))
        vars(place)["commit"] = points.around(place.commit, lambda *_: "commit")
        return
    fs: Any = place.fs
    if hasattr(fs, "_call_s3"):
        fs._call_s3 = points.around_async(fs._call_s3, lambda method, *_, **__: method)
    else:
        fs._request = points.around_async(
            fs._request, lambda method, path, *_, **named: f"{method} {_what(path, named)}"
        )


def _what(path: str, named: dict[str, Any]) -> str:
    if "upload_id" in path:
        return "resumable part"
    return f"upload {named.get('uploadType', '')}".strip() if "upload" in path else "object"


def attempt(order: dict[str, Any]) -> None:
    """Saves a step in pieces, then prunes."""
    objects.PART = PART
    die_at = order.get("die_at")
    points = Points(order["status"], die_at and tuple(die_at))
    retry = Retry(budget=5, first=0.05, cap=0.5)
    options = {"retry": retry, "spool": order["spool"], **order["options"]}
    CheckpointStore(order["url"], **options).latest()  # the connections are this filesystem's
    store = CheckpointStore(order["url"], **options)
    watch(points, store._catalog.place)
    files = _files(points, order)
    if order.get("delay") is not None:
        threading.Thread(target=_die_after, args=(order["delay"],), daemon=True).start()
    begin = time.monotonic()
    points.phase = "save"
    points("begin")
    store.save(files, step=order["step"], metrics={"loss": 1.0 / order["step"]})
    points.committed = True
    points.phase = "delete"
    points("begin")
    store.prune([Last(2)])
    points.phase = "end"
    points("done")
    Path(order["status"] + ".points").write_text(
        json.dumps({"points": points.seen, "seconds": time.monotonic() - begin})
    )


def _files(points: Points, order: dict[str, Any]) -> dict[str, Callable[[str], None]]:
    from tests.checkpoint.targets import expected

    def writing(data: bytes) -> Callable[[str], None]:
        def write(path: str) -> None:
            with builtins.open(path, "wb") as file:
                for start in range(0, len(data), len(data) // 4 + 1):
                    points("before write")
                    file.write(data[start : start + len(data) // 4 + 1])
                    file.flush()
            points("after write")

        return write

    content = expected(order["step"], order["size"])
    return {name: writing(data) for name, data in content.items()}


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


class Nursery:
    """The process that forks; made with `nursery()`."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def run(self, order: dict[str, Any]) -> int:
        """Runs one attempt; returns its exit status, negative if a signal ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    """Starts it, and ends it with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.victim"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Nursery(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """Forks once a line."""
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for client in ("gcsfs", "s3fs"):
        importlib.import_module(client)  # once, not in every fork
    saving.draft({"x": str}, 1, None, None, 1)  # so are the libraries' versions read
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                attempt(json.loads(line))
                code = 0
            except BaseException:  # noqa: BLE001 - its end is told by the code
                traceback.print_exc()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
