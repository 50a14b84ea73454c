"""A worker pod with OpenSSH's own server, as the kernel runs it there: PID 1, an ordinary user, no
capabilities, a read-only root. Needs root, for the namespaces, and sshd."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.kubernetes.pods import UID

from . import pods
from .cases import ROOT

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
# One that others than root can run; the scripts need nothing but the standard library.
PYTHON = "/usr/bin/python3"
NEEDED = (PYTHON, "ssh", "ssh-keygen", "unshare", "setpriv")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or SSHD is None or not all(map(shutil.which, NEEDED)),
        reason=f"needs root, OpenSSH's server and client, unshare, setpriv and {PYTHON}",
    ),
]

# What the kubelet makes: the user's entry, mounted keys, /tmp, all else read-only.
POD = """\
set -eu
mount --make-rprivate /
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/group /etc/group
mount --bind {folder}/tmp /tmp
mount -o remount,bind,ro /
exec setpriv --reuid={uid} --regid={uid} --clear-groups --no-new-privs --inh-caps=-all \\
    --bounding-set=-all {python} /pod/worker.py --port {port} --keys {keys} --grace 20
"""


@pytest.fixture
def folder(tmp_path):
    """Files for the pod, in a place that its user may enter."""
    made = Path("/var/tmp") / f"pod-{os.getpid()}-{tmp_path.name[:20]}"
    made.mkdir(mode=0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def pod(folder):
    """Its command, the ssh command that reaches it, and its /tmp."""
    (folder / "tmp").mkdir()
    os.chmod(folder / "tmp", 0o1777)
    # As the operator's Secret is mounted: root's files, for everyone to read.
    (folder / "keys").mkdir()
    key = folder / "keys" / "id_rsa"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(key)], check=True, timeout=60
    )
    shutil.copy(f"{key}.pub", folder / "keys" / "authorized_keys")
    os.chmod(folder / "keys", 0o2775)
    (folder / "passwd").write_text(
        Path("/etc/passwd").read_text() + f"orchestrator:x:{UID}:{UID}::/tmp:/bin/sh\n"
    )
    (folder / "group").write_text(Path("/etc/group").read_text() + f"orchestrator:x:{UID}:\n")
    shutil.copytree(ROOT / "k8s" / "pod", folder / "pod")
    (folder / "tmp" / "rank.py").write_text(pods.RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = POD.format(folder=folder, uid=UID, port=port, keys=folder / "keys", python=PYTHON)
    script = script.replace("/pod/worker.py", f"{folder}/pod/worker.py")
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    ssh = ["ssh", "-i", key, "-p", port, "-F", "none", "-o", "StrictHostKeyChecking=no"]
    ssh += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]
    reach = [*map(str, ssh), "orchestrator@127.0.0.1"]
    return [*unshare, "sh", "-c", script], reach, folder / "tmp", port


def ready(port):
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def end(worker):
    """SIGTERM to PID 1 of the pod alone, as the kubelet does."""
    (child,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)


def rank(tmp, name="rank"):
    """A rank's command, and where it leaves word."""
    (tmp / name).mkdir()
    os.chmod(tmp / name, 0o777)
    return shlex.join([PYTHON, "/tmp/rank.py", f"/tmp/{name}"]), tmp / name


def test_a_preempted_pod_ends_in_a_commit(pod):
    command, ssh, tmp, port = pod
    with pods.running(*command, POD_SECRET="of the pod", PATH=os.environ["PATH"]) as worker:
        pods.wait(worker, lambda: ready(port), "sshd answers")
        asked = "id -u; echo $POD_SECRET; touch /etc/orchestrator-was-here || echo read-only"
        said = subprocess.run([*ssh, asked], capture_output=True, text=True, timeout=30)
        assert said.stdout.split("\n")[:3] == [str(UID), "of the pod", "read-only"], said.stderr
        started, left = rank(tmp)
        with pods.running(*ssh, f"cd /tmp && {started}") as session:
            pods.wait(session, (left / "started").exists, "the rank starts")
            end(worker)
            session.communicate(timeout=pods.DEADLINE)
            assert session.returncode == 75
        said, _ = worker.communicate(timeout=pods.DEADLINE)
    assert (left / "committed").read_text() == "1"
    assert worker.returncode == 143, said
    assert "told 1 processes" in said


def test_the_ranks_of_mpiexec_commit_too(pod, folder):
    """Its proxy, which swallows the signal, stands between sshd and the ranks."""
    command, ssh, tmp, port = pod
    # Where the pod's user may go.
    for program in ("mpiexec", "hydra_pmi_proxy"):
        shutil.copy(Path(sys.executable).parent / program, folder / program)
    way = folder / "ssh"
    way.write_text(f'#!/bin/sh\nshift 2  # -x HOST\nexec {shlex.join(ssh)} "$@"\n')
    way.chmod(0o755)
    first, second = rank(tmp, "first"), rank(tmp, "second")
    # From a folder that the pod has, too, wherever this project lies.
    words = ["env", "--chdir=/tmp", str(folder / "mpiexec")]
    words += ["-launcher", "ssh", "-launcher-exec", str(way)]
    words += ["-localhost", "127.0.0.1", "-hosts", "worker-0", "-wdir", "/tmp"]
    words += ["-n", "1", *shlex.split(first[0]), ":", "-n", "1", *shlex.split(second[0])]
    with pods.running(*command, POD_SECRET="of the pod", PATH=os.environ["PATH"]) as worker:
        pods.wait(worker, lambda: ready(port), "sshd answers")
        with pods.running(*words) as launcher:
            for _, left in (first, second):
                pods.wait(launcher, (left / "started").exists, "the ranks start")
            end(worker)
            said, _ = worker.communicate(timeout=pods.DEADLINE)
            printed, _ = launcher.communicate(timeout=pods.DEADLINE)
    assert "told 2 processes" in said
    for _, left in (first, second):
        assert (left / "started").read_text() == "of the pod"
        assert (left / "committed").read_text() == "1"
    assert launcher.returncode == 75, printed
    assert worker.returncode == 143
