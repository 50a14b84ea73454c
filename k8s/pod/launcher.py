"""Waits until every host of a host file answers as an ssh server, then becomes the command.

The operator makes the launcher when the workers are ready, but only the first time. Started again
after a preemption, the launcher is there before the worker that comes instead of the lost one.

    python launcher.py --hostfile /etc/mpi/hostfile [--timeout 1800] -- COMMAND...
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

_TRY_SECONDS = 5.0
_PAUSE = 1.0


def hosts(text: str) -> list[str]:
    """The names in a host file: `name slots=N`, `name:N` or `name` a line, `#` comments."""
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    return [words[0].partition(":")[0] for words in lines if words]


def answers(host: str, port: int) -> bool:
    """Whether an ssh server greets there; an open port alone may be a proxy's."""
    try:
        with socket.create_connection((host, port), _TRY_SECONDS) as connection:
            connection.settimeout(_TRY_SECONDS)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def wait_for(names: list[str], port: int, timeout: float) -> list[str]:
    """Gives the hosts that did not answer in time: none, when all is well."""
    end = time.monotonic() + timeout
    missing = [name for name in names if not answers(name, port)]
    if missing:
        say(f"waiting up to {timeout:g} s for {len(missing)} of {len(names)} hosts")
    while missing and time.monotonic() < end:
        time.sleep(_PAUSE)
        missing = [name for name in missing if not answers(name, port)]
    return missing


def say(text: str) -> None:
    """One line to the pod's log."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Becomes the command; or 1 if a host is missing, 2 for a wrong call."""
    parser = argparse.ArgumentParser(description="Wait for all hosts, then run a command.")
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds (%(default)s)")
    parser.add_argument("--port", type=int, default=2222, help="of sshd (%(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    # PID 1 gets no signal that it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        names = hosts(options.hostfile.read_text(encoding="utf-8"))
    except OSError as error:
        say(f"--hostfile {options.hostfile} cannot be read: {error}. The operator mounts it.")
        return 2
    if not names or not command:
        say(f"{options.hostfile} names {len(names)} hosts, the command {len(command)} words")
        return 2
    missing = wait_for(names, options.port, options.timeout)
    if missing:
        say(
            f"no ssh server on port {options.port} of {', '.join(missing)} within "
            f"{options.timeout:g} s. See why the pods do not run: kubectl describe pod"
        )
        return 1
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
