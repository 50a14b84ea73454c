"""Starts a command on real ranks, with a deadline, and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {"horovod": ("horovodrun", "-np"), "mpi": ("mpiexec", "-n")}
_MARK = "ORCHESTRATOR_TEST_LAUNCH"


@dataclass(frozen=True)
class Finished:
    """How a launch ended.

    Attributes:
        returncode: The launcher's own; `None` if it was killed at the deadline.
        output: What the launcher and its ranks printed, stdout and stderr together.
        seconds: From start to end.
        left: Command lines of processes that outlived the launcher (killed by now).
    """

    returncode: int | None
    output: str
    seconds: float
    left: list[str]


def executable(name: str) -> str:
    """A launcher, beside the Python that runs the tests."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `make setup` installs it.")
    return str(path)


def environment(**more: str) -> dict[str, str]:
    """For ranks that share few cores; nothing of an outer launcher or pytest gets in."""
    dropped = ("HOROVOD_", "PMI", "OMPI_", "PYTEST_", "ORCHESTRATOR_TEST_", "MPI")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {
        **kept,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def launch(
    backend: str,
    size: int,
    command: Sequence[str],
    folder: Path,
    *,
    deadline: float = 300,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Runs `command` on `size` ranks under `horovodrun` or `mpiexec`, from the repository's root.

    Args:
        backend: `"horovod"` or `"mpi"`; or `"none"` to run it without a launcher.
        size: How many ranks.
        command: Without the interpreter where it starts with `-m` or a script.
        folder: Where the output goes, as `launcher.log`.
        deadline: Seconds after which everything is killed.
        env: Added to `environment()`.
    """
    mark = uuid.uuid4().hex
    words = [sys.executable, *command]
    if backend != "none":
        name, option = LAUNCHERS[backend]
        words = [executable(name), option, str(size), *words]
    log = folder / "launcher.log"
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(**{_MARK: mark}, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = process.wait(deadline)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            # Whatever ends this function, a KeyboardInterrupt too, ends the ranks.
            seconds = time.monotonic() - begin
            left = end_all(mark, grace=2.0 if process.poll() is not None else 0.0)
            process.wait(10)
    return Finished(returncode, log.read_text("utf-8", "replace"), seconds, left)


def end_all(mark: str, grace: float) -> list[str]:
    """Kills what carries `mark` in its environment, after `grace` seconds; returns what it was.

    `horovodrun` puts its ranks in sessions of their own, so a process group would miss them.
    """
    end = time.monotonic() + grace
    while (alive := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    found = [f"{pid}: {line}" for pid, line in alive.items()]
    for _ in range(100):
        if not alive:
            break
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        alive = _marked(mark)
    return found


def _marked(mark: str) -> dict[int, str]:
    """Living processes with `mark` in their environment, by their command lines."""
    needle = f"{_MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if needle not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state != "Z":
                line = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                found[int(entry.name)] = line.strip()
    return found


def tails(folder: Path, pattern: str = "*.log", lines: int = 60) -> str:
    """The end of each output file, for the message of a failed test."""
    parts = []
    for path in sorted(folder.glob(pattern)):
        text = path.read_text("utf-8", "replace").splitlines()
        shown = "\n".join(text[-lines:])
        parts.append(
            f"--- {path.name} (last {min(lines, len(text))} of {len(text)} lines)\n{shown}"
        )
    return "\n".join(parts) or f"no output in {folder}"
