"""Namespaces of Linux for tests: whether they can be made, entered, and what is in them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""
NEEDED = ("ip", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen")
DEADLINE = 30.0
# The first process of the namespaces ends with this one, and with it whatever is in them.
ALONE = ("setpriv", "--pdeathsig=KILL", "unshare", "--net")
ISOLATED = (
    *ALONE,
    *("--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"),
)
ENTERED = ("--net", "--mount", "--pid", "--uts", "--ipc")
_CLONE_NEWNET = 0x40000000


@cache
def missing(*more: str) -> str:
    """Why there can be no hosts here; nothing if there can.

    Args:
        more: Programs that are needed as well.
    """
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    absent = [name for name in (*NEEDED, *more) if shutil.which(name) is None]
    absent += [] if SSHD else ["sshd"]
    if absent:
        packages = "apt-get install openssh-server openssh-client iproute2"
        return f"{', '.join(absent)} not installed: {packages}"
    probe = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    tried = subprocess.run(
        [*ISOLATED, "sh", "-c", probe], capture_output=True, text=True, timeout=DEADLINE
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Has this thread, and what it starts, open its sockets in the network of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        open("/proc/thread-self/ns/net", "rb") as before,
        open(f"/proc/{pid}/ns/net", "rb") as there,
    ):
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            libc.setns(before.fileno(), _CLONE_NEWNET)


def living_in(first: int) -> dict[int, str]:
    """Command lines by process id, beside a first process in its namespace; not of the dead."""
    found: dict[int, str] = {}
    ours = os.readlink(f"/proc/{first}/ns/pid")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == first:
            continue
        with contextlib.suppress(OSError):
            if os.readlink(entry / "ns" / "pid") == ours:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                found |= {int(entry.name): line} if line else {}
    return found


def innermost(pid: int, depth: int | None = None) -> int:
    """The only child's only child, and so on, of a process."""
    while depth != 0:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            break
        pid, depth = int(children[0]), None if depth is None else depth - 1
    return pid


def wait(
    condition: Callable[[], object],
    what: str,
    seconds: float = DEADLINE,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Until a condition holds, with a deadline, and only while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"{what}: before, a process ended with {process.returncode}")
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.01)
