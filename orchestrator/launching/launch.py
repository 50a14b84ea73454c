"""`orchestrator launch`: what it was asked for, checked, and run as often as that takes."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config import SettingError
from orchestrator.launching import rank
from orchestrator.launching.hosts import LOOPBACK, Host, addresses
from orchestrator.launching.job import Job
from orchestrator.launching.outcome import PREEMPTED, Outcome

GRACE = 25.0  # Kubernetes gives 30
_INSTALL = {
    "horovodrun": "build Horovod with `make setup` or `tools/build_horovod`, or use --mpi",
    "mpiexec": "`pip install 'keras-orchestrator[mpi]'`",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A command on many ranks.

    Args:
        size: How many ranks.
        command: What each of them runs.
        mpi: By `mpiexec`; else by `horovodrun`.
        grace: Seconds from a signal to the end of what is still running.
        restarts: How often to start again what ended with 75 without a signal to this process.
        hosts: Where to; none for this machine, or where a scheduler says.
        launcher_args: More options for the launcher, as in a shell.

    Raises:
        SettingError: One of them cannot be right.
    """

    size: int
    command: Sequence[str]
    mpi: bool = False
    grace: float = GRACE
    restarts: int = 0
    hosts: Sequence[Host] = ()
    launcher_args: str = ""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SettingError(f"-np {self.size} is not allowed: start at least one rank.")
        if not self.command:
            raise SettingError("There is no command: put it last, after `--`.")
        if not 0 <= self.grace < float("inf"):
            raise SettingError(f"--grace {self.grace:g} is not allowed: give seconds, 0 or more.")
        if self.restarts < 0:
            raise SettingError(f"--restart {self.restarts} is not allowed: give 0 or more.")
        slots = sum(host.slots for host in self.hosts)
        if self.hosts and slots < self.size:
            raise SettingError(
                f"-np {self.size} is more than the hosts take, {slots}: raise their slots "
                f"({','.join(map(str, self.hosts))}), or start fewer ranks."
            )

    def run(self) -> int:
        """Returns the exit code: the ranks' own."""
        return asyncio.run(self._run(self._words(), addresses(self.hosts)))

    def _words(self) -> list[str]:
        """The launcher and its options, up to what a rank runs."""
        name, option = ("mpiexec", "-n") if self.mpi else ("horovodrun", "-np")
        words = [find(name), option, str(self.size)]
        if self.hosts:
            words += ["-host" if self.mpi else "-H", ",".join(map(str, self.hosts))]
            if self.mpi and addresses(self.hosts) != [LOOPBACK] and _is_open_mpi(words[0]):
                words += ["-x", rank.VARIABLE]
        try:
            return words + shlex.split(self.launcher_args)
        except ValueError as error:
            raise SettingError(
                f"--launcher-args {self.launcher_args!r} cannot be read: {error}; quote as in a "
                "shell."
            ) from error

    async def _run(self, launcher: Sequence[str], here: Sequence[str]) -> int:
        job: Job | None = None
        signals: list[int] = []

        def receive(number: int) -> None:
            if not signals and job is not None:
                job.signal(number)
            elif number != signal.SIGUSR1 and job is not None:
                job.kill(f"at a second signal, {signal.Signals(number).name}")
            signals.append(number)

        loop = asyncio.get_running_loop()
        for number in rank.PASSED:
            loop.add_signal_handler(number, receive, number)
        for left in range(self.restarts, -1, -1):
            job = Job(self.size, launcher, self.command, here, self.grace)
            outcome = await job.run()
            again = outcome.code == PREEMPTED and left > 0 and not signals
            _say(outcome, f"; restart {self.restarts - left + 1} of {self.restarts}" * again)
            if not again:
                break
        return outcome.code


def _say(outcome: Outcome, more: str) -> None:
    if outcome.reason:
        print(f"orchestrator launch: {outcome.reason}{more}", file=sys.stderr, flush=True)


def find(name: str) -> str:
    """A launcher beside this Python, or on the PATH.

    Raises:
        SettingError: There is none; says how to install it.
    """
    beside = os.path.dirname(sys.executable)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise SettingError(f"{name} is not on the PATH: {_INSTALL[name]}.")
    return found


def _is_open_mpi(mpiexec: str) -> bool:
    """Open MPI's takes only named variables to other hosts."""
    asked = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in asked.stdout or "OpenRTE" in asked.stdout
