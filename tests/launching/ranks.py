"""A rank without TensorFlow that does one thing: `ranks.py FOLDER WHAT [ARGUMENT]...`.

It leaves `started.RANK` in the folder with its process id, once it would hear a signal, and
`signals.RANK` with those it heard.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = next(os.environ[name] for name in ("HOROVOD_RANK", "PMI_RANK") if name in os.environ)
HEARD = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


class Rank:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        self.leave("started", str(os.getpid()))

    def leave(self, name: str, text: str) -> None:
        with (self.folder / f"{name}.{RANK}").open("a") as file:
            file.write(text + "\n")

    def hear(self, seconds: float = 60) -> None:
        info = signal.sigtimedwait(HEARD, seconds)
        if info is not None:
            self.leave("signals", signal.Signals(info.si_signo).name)

    def all_started(self, size: int = 2) -> None:
        while len(list(self.folder.glob("started.*"))) < size:
            time.sleep(0.01)

    def checkpoint(self, seconds: str) -> int:
        """Takes so long to write one at a signal."""
        self.hear()
        time.sleep(float(seconds))
        self.hear(0)
        self.leave("saved", "whole")
        return 75

    def fails(self, which: str, how: str) -> int:
        """One rank ends by a code or `KILL`, the others fail in consequence."""
        self.all_started()
        if which != RANK:
            self.hear()
            return 1
        if how == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        return int(how)

    def stubborn(self) -> int:
        """Hears a signal, and goes on; as does what it started."""
        subprocess.Popen(["sleep", "600"])
        self.hear()
        time.sleep(600)
        return 0

    def alone(self) -> int:
        """Ends preempted at the first start."""
        starts = (self.folder / f"started.{RANK}").read_text().count("\n")
        return 75 if starts == 1 else 0

    def early(self) -> int:
        """Rank 1 ends preempted while it starts; the other waits for it, at first."""
        if RANK == "1":
            return self.alone()
        if (self.folder / "started.0").read_text().count("\n") == 1:
            time.sleep(600)
        return 0

    def reports(self) -> int:
        print(f"rank {RANK} reads {sys.stdin.read()!r}")
        print(f"rank {RANK} sees {sorted(k for k in os.environ if 'ORCHESTRATOR_LAUNCH' in k)}")
        return 0

    def aborts(self, code: str) -> int:
        from mpi4py import MPI

        if RANK == "1":
            MPI.COMM_WORLD.Abort(int(code))
        time.sleep(600)
        return 0


if __name__ == "__main__":
    folder, what, *arguments = sys.argv[1:]
    sys.exit(getattr(Rank(folder), what)(*arguments))
