"""Hosts made of namespaces on this machine: each with a network, processes, a name, an ssh server.

    with Network(tmp_path / "net", ["host1", "host2"]) as net:
        with net.running("host1", ["horovodrun", "-H", "host1:2,host2:2", ...], ...) as job:
            net.cut("host2")

Nothing of it is the machine's own: the bridge that joins the hosts stands in a namespace as well,
no namespace has a name, and what a host mounts its own processes see alone. When the process that
made them ends, however it ends, so do they. The hosts share the disk. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests import namespaces
from tests.namespaces import ALONE, DEADLINE, ENTERED, ISOLATED, SSHD, innermost, living_in, wait

_BRIDGE = """\
set -eu
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
ip address add "$1/24" dev br0
echo ready
exec sleep infinity
"""
# A host has of its own: the names of all, root's home and keys, and sshd.
_HOST = """\
set -eu
hostname "$1"
for name in hosts passwd shadow; do mount --bind "$2/$name" "/etc/$name"; done
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs none /run
mkdir /run/sshd
echo ready
read -r go
exec "$3" -D -e -f "$2/sshd_config" > /dev/null < /dev/null
"""
_SSHD_CONFIG = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
MaxStartups 100
PidFile none
"""
_SSH_CONFIG = """\
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    BatchMode yes
"""


class Network:
    """A bridge, and hosts at it that run an ssh server and let root in by key.

    Args:
        folder: Where their files go; it is made, and removed at the end.
        names: The hosts'.

    Attributes:
        gateway: The bridge's address, which every host reaches.
        pids: The first process of each host, as the machine counts.
    """

    gateway = "10.77.0.1"

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        self.folder = folder
        self._names = names
        self._processes: list[tuple[subprocess.Popen[bytes], int]] = []
        self.pids: dict[str, int] = {}
        self._addresses: dict[str, str] = {}
        self._ports: dict[str, str] = {}
        self._joined = 0

    def __enter__(self) -> Network:
        self.folder.mkdir(parents=True)
        try:
            self._write_files()
            words = ["sh", "-c", _BRIDGE, "bridge", self.gateway]
            self._bridge = self._first_in([*ALONE, *words], "bridge")[1]
            for name in self._names:
                self.add(name, ["sh", "-c", _HOST, "host", name, str(self.folder), SSHD])
            for name in self._names:
                wait(lambda name=name: self._lets_in(name), f"sshd of {name}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for process, first in self._processes:
            if process.poll() is None:
                # Reaped only when nothing is left in its namespace.
                os.kill(first, signal.SIGKILL)
            process.communicate(timeout=DEADLINE)
        shutil.rmtree(self.folder)

    def add(self, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Makes a host of a first process.

        Args:
            name: Of the host, and more that it is found by from now on, with spaces between.
            words: A command that prints `ready`, and goes on as it reads a line.
        """
        process, pid = self._first_in([*ISOLATED, *words], name.split()[0])
        self._join(name, pid)
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
        process.stdin = None
        return process

    def _first_in(self, words: Sequence[str], name: str) -> tuple[subprocess.Popen[bytes], int]:
        """A process, once ready, and the first one in its namespaces as the machine counts."""
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        assert process.stdout is not None
        ready = process.stdout.readline() == b"ready\n"
        first = innermost(process.pid) if ready else process.pid
        self._processes.append((process, first))
        if not ready:
            raise RuntimeError(f"no {name}: {(self.folder / f'{name}.log').read_text()}")
        return process, first

    def _join(self, name: str, pid: int) -> None:
        self._joined += 1
        port, address = f"port{self._joined}", f"10.77.0.{self._joined + 1}"
        inside = f"--target={pid}"
        peer = ("peer", "name", "eth0", "netns", str(pid))
        self._ip(f"--target={self._bridge}", "link", "add", port, "type", "veth", *peer)
        self._ip(f"--target={self._bridge}", "link", "set", port, "master", "br0", "up")
        self._ip(inside, "address", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            self._ip(inside, "link", "set", link, "up")
        self.pids[name.split()[0]], self._ports[name.split()[0]] = pid, port
        new = set(name.split())
        self._addresses = {k: a for k, a in self._addresses.items() if not new & set(k.split())}
        self._addresses[name] = address
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in self._addresses.items())]
        # The file that is mounted, not one in its place.
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def _lets_in(self, host: str) -> bool:
        return self.run(host, ["ssh", host, "true"]).returncode == 0

    def address(self, host: str) -> str:
        """A host's address."""
        return next(a for names, a in self._addresses.items() if host in names.split())

    def _ip(self, target: str, *words: str) -> None:
        subprocess.run(["nsenter", target, "--net", "ip", *words], check=True, timeout=DEADLINE)

    def _write_files(self) -> None:
        """What the hosts mount; root has an empty home, so that no settings of a user act."""
        (self.folder / "home").mkdir()
        key = str(self.folder / "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        root = f"root:x:0:0:root:{self.folder}/home:/bin/sh\n"
        sshd = "sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        files = {
            "hosts": "",
            "passwd": root + sshd,
            "shadow": "root:*:19000:0:99999:7:::\n",
            "ssh_config": _SSH_CONFIG.format(folder=self.folder),
            "sshd_config": _SSHD_CONFIG.format(folder=self.folder),
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def command(self, host: str, words: Sequence[str], cwd: str | Path = "/") -> list[str]:
        """What runs a command on a host."""
        enter = ["nsenter", f"--target={self.pids[host]}", *ENTERED]
        return [*enter, "env", f"--chdir={cwd}", *words]

    def run(self, host: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A short command on a host, to its end."""
        return subprocess.run(
            self.command(host, words), capture_output=True, text=True, timeout=DEADLINE
        )

    @contextlib.contextmanager
    def running(
        self, host: str, words: Sequence[str], log: Path, cwd: Path, env: Mapping[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A command on a host, which ends with the block."""
        with open(log, "wb") as output:
            process = subprocess.Popen(
                self.command(host, words, cwd),
                env={**env, "HOME": str(self.folder / "home")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                self.signal(process, signal.SIGKILL)
            process.wait(DEADLINE)

    def signal(self, process: subprocess.Popen[bytes], number: int) -> None:
        """To a command itself, which is the child of what entered the host."""
        os.kill(innermost(process.pid, 1), number)

    def cut(self, host: str) -> None:
        """Takes a host's cable out at the other end: nothing arrives any more, nor says so."""
        self._ip(f"--target={self._bridge}", "link", "set", self._ports[host], "nomaster")

    def restore(self, host: str) -> None:
        """Puts the cable back."""
        self._ip(f"--target={self._bridge}", "link", "set", self._ports[host], "master", "br0")

    def hide(self, host: str, folder: Path) -> None:
        """Has a host see an empty folder of its own where the others see a shared one."""
        self.run(host, ["mount", "-t", "tmpfs", "none", str(folder)]).check_returncode()

    def processes(self, host: str) -> dict[int, str]:
        """Command lines on a host by process id, without its first process and what is dead."""
        return living_in(self.pids[host])

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Has this thread, and what it starts, open its sockets at the bridge's address."""
        return namespaces.network_of(self._bridge)
