"""What sshd starts for each session: the asked-for command, in the pod's environment.

sshd gives a session next to nothing of its own environment; a rank needs the pod's: the PATH, the
user's variables, and the credentials that come from a Secret or from workload identity. They are
taken from PID 1 itself and stand in no file and on no command line.

    SSH_ORIGINAL_COMMAND=... python session.py PID
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MARK = "ORCHESTRATOR_SESSION_OF"  # as worker.py looks for it


def pod_environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    pairs = (entry.decode(errors="surrogateescape").partition("=") for entry in entries if entry)
    return {name: value for name, _, value in pairs}


def main() -> None:
    """Becomes the command."""
    command = os.environ.get("SSH_ORIGINAL_COMMAND")
    if not command:
        sys.exit("session: only commands are run here; for a shell use `kubectl exec`")
    worker = int(sys.argv[1])
    environment = {**pod_environment(worker), MARK: str(worker)}
    os.execve("/bin/sh", ["sh", "-c", command], environment)


if __name__ == "__main__":
    main()
