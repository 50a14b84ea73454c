"""A worker pod that is to end: the ranks in it are told, once, and have the time to commit."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest

from . import pods


@pytest.fixture
def rank(tmp_path):
    """A session's command as `horovodrun` gives it, and the folder where the rank leaves word."""
    script = tmp_path / "rank.py"
    script.write_text(pods.RANK)

    def command(name, *words):
        folder = tmp_path / name
        folder.mkdir()
        started = shlex.join([sys.executable, str(script), str(folder), *words])
        # A shell that waits, as sshd's and horovodrun's do, and tells how the rank ended.
        return f"cd {folder} && env A=1 sh -c '{started}; echo $? > code'", folder

    return command


def worker(*sessions, grace=20.0, server=pods.SSHD):
    words = [sys.executable, pods.SCRIPTS / "worker.py", "--grace", str(grace), "--server"]
    return pods.running(*words, *pods.python(server, *sessions), POD_SECRET="of the pod")


def test_every_rank_is_told_once_and_commits(rank):
    first, one = rank("one")
    second, two = rank("two")
    with worker(first, second) as process:
        pods.wait(
            process,
            lambda: (one / "started").exists() and (two / "started").exists(),
            "ranks start",
        )
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 143, said
    assert "told 2 processes" in said
    for folder in (one, two):
        assert (folder / "committed").read_text() == "1", "more signals than one"
        assert (folder / "code").read_text() == "75\n"
        # The pod's own environment, of which sshd passes nothing on.
        assert (folder / "started").read_text() == "of the pod"


def test_under_orchestrator_launch_the_stand_in_is_told(rank, tmp_path):
    """Three processes stand where the launcher sees one; the rank is told by the first of them."""
    _, folder = rank("one")
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import signal, subprocess, sys\n"
        "rank = subprocess.Popen(sys.argv[1:], start_new_session=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: rank.send_signal(signal.SIGTERM))\n"
        "sys.exit(rank.wait())\n"
    )
    command = f"{sys.executable} {stand_in} {sys.executable} {tmp_path / 'rank.py'} {folder}"
    with worker(f"{command}; echo $? > {folder}/code") as process:
        pods.wait(process, lambda: (folder / "started").exists(), "the rank starts")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert "told 1 processes" in said
    assert (folder / "committed").read_text() == "1"
    assert (folder / "code").read_text() == "75\n"


# What mpiexec takes for ssh: the command reaches the worker as sshd would have it run.
SSH = """\
#!/bin/sh
shift 2  # -x HOST
exec env -i PATH=/nonesuch SSH_ORIGINAL_COMMAND="$*" {python} {session} {worker}
"""
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("by", ["mpiexec", "orchestrator launch"])
def test_under_mpiexec_the_ranks_are_told_and_not_its_proxy(tmp_path, by):
    (tmp_path / "rank.py").write_text(pods.RANK)
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    ssh = tmp_path / "ssh"
    command = f"exec {sys.executable} {tmp_path}/rank.py {tmp_path}/$PMI_RANK"
    where = ["-launcher", "ssh", "-launcher-exec", str(ssh), "-hosts", "worker-0"]
    words = [BIN / "mpiexec", "-n", "2", *where]
    if by == "orchestrator launch":
        words = [BIN / "orchestrator", "launch", "-np", "2", "--mpi"]
        words += ["--launcher-args", shlex.join(where), "--"]
    with worker() as process:
        session = pods.SCRIPTS / "session.py"
        ssh.write_text(SSH.format(python=sys.executable, session=session, worker=process.pid))
        ssh.chmod(0o755)
        with pods.running(*words, "sh", "-c", command) as launcher:
            for folder in folders:
                pods.wait(launcher, (folder / "started").exists, "ranks start")
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=pods.DEADLINE)
            printed, _ = launcher.communicate(timeout=pods.DEADLINE)
    assert "told 2 processes" in said
    for folder in folders:
        assert (folder / "started").read_text() == "of the pod"
        assert (folder / "committed").read_text() == "1"
    assert launcher.returncode == 75, printed
    assert process.returncode == 143


def test_what_does_not_end_is_killed_after_the_grace(rank):
    command, folder = rank("one", "stubborn")
    with worker(command, grace=0.5) as process:
        pods.wait(process, lambda: (folder / "started").exists(), "the rank starts")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 143
    assert "still there after 0.5 s" in said
    assert not (folder / "committed").exists()


def test_without_a_session_the_pod_ends_at_once():
    server = "import time; print('up', flush=True); time.sleep(600)"
    with worker(server=server) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 143


def test_a_server_that_ends_ends_the_pod():
    with worker(server="import sys; sys.exit(3)") as process:
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 3
    assert "sshd ended by itself with 3" in said


def test_no_shell_is_given():
    command = [sys.executable, pods.SCRIPTS / "session.py", "1"]
    with pods.running(*command, SSH_ORIGINAL_COMMAND="") as process:
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 1
    assert "kubectl exec" in said
