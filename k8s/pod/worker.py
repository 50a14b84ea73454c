"""PID 1 of a worker pod: sshd for the launcher, and the pod's end told to the ranks.

Kubernetes signals PID 1 alone, and sshd would end without a word to the ranks below it. Here
SIGTERM goes on to what each ssh session runs: to the first processes in it that are neither shells
nor mpiexec's proxy. Under `orchestrator launch` each stands in for a rank and passes it on, under
`horovodrun` and `mpiexec` it is the rank. A rank that is told has all ranks stop with a checkpoint.
The pod stays until they have.

Only the standard library, and no privileges: it runs before and beside everything else.

    python worker.py [--grace SECONDS] [--port 2222]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

MARK = "ORCHESTRATOR_SESSION_OF"  # in the environment of all that a session starts
# They start a session's ranks and pass no signal on; MPICH's proxy ignores it. As the kernel names
# processes, by 15 characters at most.
STARTERS = ("sh", "bash", "dash", "ash", "hydra_pmi_proxy")
SESSION = Path(__file__).with_name("session.py")
ENDED_BY_SIGTERM = 128 + signal.SIGTERM
_TICK = 0.1


class Process(NamedTuple):
    """A process of a session."""

    pid: int
    parent: int
    name: str


def sessions(worker: int) -> dict[int, Process]:
    """All processes that came in through this worker's sshd, by process id."""
    mark = f"{MARK}={worker}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        # It may end while it is looked at, or be another user's.
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                before, _, after = (folder / "stat").read_text().rpartition(")")
                name = before.partition("(")[2]
                pid = int(folder.name)
                found[pid] = Process(pid, int(after.split()[1]), name)
    return found


def to_tell(processes: dict[int, Process]) -> Iterator[int]:
    """Those that get the signal: the first in each session that do not only start others.

    A shell would die of it, and what it waits for would go on unseen.
    """
    for one in processes.values():
        above = processes.get(one.parent)
        while above is not None and above.name in STARTERS:
            above = processes.get(above.parent)
        if one.name not in STARTERS and above is None:
            yield one.pid


def sshd_command(folder: Path, port: int, keys: str) -> list[str]:
    """The ssh server as an ordinary user starts it, with a host key of this pod's own."""
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None:
        raise FileNotFoundError("sshd is not installed in this image: it has to hold OpenSSH's")
    key = folder / "host_key"
    made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(made, check=True, stdin=subprocess.DEVNULL)
    options = {
        "Port": port,
        "HostKey": key,
        "PidFile": "none",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "AuthorizedKeysFile": f"{keys}/authorized_keys",
        # Kubernetes mounts the keys for the pod's group, which sshd takes for carelessness.
        "StrictModes": "no",
        "AllowTcpForwarding": "no",
        "AllowAgentForwarding": "no",
        "X11Forwarding": "no",
        # A host that vanished is noticed in half a minute.
        "ClientAliveInterval": 10,
        "ClientAliveCountMax": 3,
        # The launcher opens a session for each rank at once.
        "MaxStartups": 100,
        "ForceCommand": f"{sys.executable} -I {SESSION} {os.getpid()}",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [sshd, "-D", "-e", "-f", "/dev/null", *words]


class Worker:
    """Holds the server, and on SIGTERM sees the sessions to their end.

    Args:
        server: The ssh server's command.
        grace: Seconds from SIGTERM until what still runs is killed.
    """

    def __init__(self, server: list[str], grace: float) -> None:
        self._grace = grace
        self._told: set[int] = set()
        self._asked = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        self._server = subprocess.Popen(server, stdin=subprocess.DEVNULL).pid
        self._code: int | None = None

    def run(self) -> int:
        """Gives the server's exit code if it ends by itself, else 143 once no session is left."""
        while not self._asked.wait(_TICK):
            self._reap()
            if self._code is not None:
                say(f"sshd ended by itself with {self._code}")
                return self._code or 1
        return self._drain()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

    def _drain(self) -> int:
        end = time.monotonic() + self._grace
        # No new session: whoever starts again has to wait for the pod that comes instead.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._server, signal.SIGTERM)
        while (left := sessions(os.getpid())) and time.monotonic() < end:
            self._tell(left)
            self._reap()
            time.sleep(_TICK)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left:
            say(f"killed {len(left)} processes that were still there after {self._grace:g} s")
        return ENDED_BY_SIGTERM

    def _tell(self, processes: dict[int, Process]) -> None:
        # Once each, and none whose parent was told: a second signal has a rank drop everything.
        new = [pid for pid in to_tell(processes) if pid not in self._told]
        self._told |= set(processes)
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if new:
            say(f"the pod is to end: told {len(new)} processes, waiting up to {self._grace:g} s")

    def _reap(self) -> None:
        """Buries what ended, orphans of the sessions too, which fall to PID 1."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._server:
                    self._code = os.waitstatus_to_exitcode(status)


def say(text: str) -> None:
    """One line to the pod's log."""
    print(f"worker: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs until the server ends or the pod is asked to."""
    parser = argparse.ArgumentParser(description="sshd, and SIGTERM for what came in over it.")
    parser.add_argument("--grace", type=float, default=35.0, help="seconds (%(default)s)")
    parser.add_argument("--port", type=int, default=2222, help="sshd's port (%(default)s)")
    parser.add_argument("--keys", default="/home/orchestrator/.ssh", help="(%(default)s)")
    parser.add_argument("--server", nargs=argparse.REMAINDER, help="run this, not sshd")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="worker-") as folder:
        try:
            server = options.server or sshd_command(Path(folder), options.port, options.keys)
        except (OSError, subprocess.CalledProcessError) as error:
            say(str(error))
            return 1
        return Worker(server, options.grace).run()


if __name__ == "__main__":
    sys.exit(main())
