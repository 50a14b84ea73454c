"""Which hosts a job runs on, and at what address they find this one."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.config import SettingError

LOOPBACK = "127.0.0.1"
# Under these mpiexec takes the hosts from the scheduler, and horovodrun under LSF.
_SCHEDULERS = ("SLURM_JOB_NODELIST", "PBS_NODEFILE", "LSB_MCPU_HOSTS", "PE_HOSTFILE")
# A documentation address (RFC 5737): has the default route looked up, and nothing is sent.
_ANYWHERE = "203.0.113.1"


class Host(NamedTuple):
    """A host and how many ranks it takes."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


def parse(text: str) -> list[Host]:
    """The hosts of `-H`.

    Raises:
        SettingError: An entry is not `host:slots`.
    """
    return [_host(entry.strip(), f"-H {text}", "node1:4,node2:4") for entry in text.split(",")]


def read(path: str) -> list[Host]:
    """The hosts of a host file: a line each, `node1 slots=4`, `node1:4` or `node1`; `#` comments.

    Raises:
        SettingError: It cannot be read, names no host, or a line is none of these.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.partition("#")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--hostfile {path} cannot be read: {error}.") from error
    found = []
    for line in filter(None, lines):
        entry = re.sub(r"\s+slots\s*=\s*", ":", line).split()[0]
        entry = entry if ":" in entry else f"{entry}:1"
        found.append(_host(entry, f"--hostfile {path}", "node1 slots=4"))
    if not found:
        raise SettingError(f"--hostfile {path} names no host: write a line each, `node1 slots=4`.")
    return found


def _host(entry: str, setting: str, example: str) -> Host:
    match = re.fullmatch(r"([\w.-]+):([1-9][0-9]*)", entry)
    if match is None:
        raise SettingError(
            f"{setting}: {entry!r} is not a host and how many ranks it takes; write {example}."
        )
    return Host(match[1], int(match[2]))


def addresses(hosts: Sequence[Host]) -> list[str]:
    """IPv4 addresses of this machine for ranks on these hosts to connect to, the likeliest first.

    The loopback address alone if they are all this machine, or none is given and no scheduler
    names any.
    """
    elsewhere = [host.name for host in hosts if not _is_here(host.name)]
    if not elsewhere and (hosts or not any(name in os.environ for name in _SCHEDULERS)):
        return [LOOPBACK]
    found = [_address_towards(name) for name in (*elsewhere, _ANYWHERE, socket.gethostname())]
    return list(dict.fromkeys(a for a in found if a and not a.startswith("127."))) or [LOOPBACK]


def _is_here(name: str) -> bool:
    """Whether a name is this machine's: only its own addresses can be bound."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((socket.gethostbyname(name), 0))
    except OSError:
        return False
    return True


def _address_towards(name: str) -> str | None:
    """This machine's address on the way there; none if the name or the way is unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((name, 9))
            return probe.getsockname()[0]
    except OSError:
        return None
