"""Processes that stand for what runs in a pod, and their ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .cases import ROOT

SCRIPTS = ROOT / "k8s" / "pod"
DEADLINE = 30.0
TENSORFLOW = 200.0  # the deadline where it has to start first, on a busy machine

# An ssh server as far as a worker sees: it starts sessions, and at SIGTERM goes without them.
SSHD = f"""\
import os, subprocess, sys, time
for command in sys.argv[1:]:
    session = [sys.executable, {str(SCRIPTS / "session.py")!r}, str(os.getppid())]
    environment = {{"SSH_ORIGINAL_COMMAND": command, "PATH": "/nonesuch"}}
    subprocess.Popen(session, env=environment, start_new_session=True)
time.sleep(600)
"""

# A rank that saves a checkpoint when it is told, which takes a while.
RANK = """\
import os, signal, sys, time
folder, stubborn = sys.argv[1], "stubborn" in sys.argv
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
with open(f"{folder}/started", "w") as file:
    file.write(os.environ.get("POD_SECRET", "none"))
while stubborn or not told:
    time.sleep(0.02)
time.sleep(0.6)
with open(f"{folder}/committed", "w") as file:
    file.write(str(len(told)))
sys.exit(75)
"""


def wait(
    process: subprocess.Popen[str],
    condition: Callable[[], object],
    what: str,
    seconds: float = DEADLINE,
) -> None:
    """Until a condition holds, with a deadline, or the process ends."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"{what}: {process.returncode}, {process.communicate()[0]}")
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


@contextlib.contextmanager
def running(*command: str | Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes, and nothing left of its group after the block."""
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def python(script: str, *words: str | Path) -> list[str | Path]:
    """A Python command of a script's text."""
    return [sys.executable, "-c", script, *words]
