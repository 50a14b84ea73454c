"""What `orchestrator launch` refuses, how it calls a launcher, and whom it lets in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config import SettingError
from orchestrator.launching import launch
from orchestrator.launching.hosts import Host
from orchestrator.launching.job import Job
from orchestrator.launching.launch import Launch
from orchestrator.launching.outcome import Outcome


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": 0}, "-np 0 is not allowed"),
        ({"command": []}, "put it last, after `--`"),
        ({"grace": -1.0}, "--grace -1 is not allowed"),
        ({"grace": float("nan")}, "--grace nan is not allowed"),
        ({"restarts": -1}, "--restart -1 is not allowed"),
        (
            {"hosts": [Host("a", 1), Host("b", 2)], "size": 4},
            r"more than the hosts take, 3.*a:1,b:2",
        ),
    ],
)
def test_bad_settings(settings, told):
    with pytest.raises(SettingError, match=told):
        Launch(**{"size": 2, "command": ["true"], **settings})


def test_words(monkeypatch):
    monkeypatch.setattr(launch, "find", lambda name: f"/bin/{name}")
    monkeypatch.setattr(launch, "addresses", lambda hosts: ["127.0.0.1"])
    hosts = [Host("a", 1), Host("b", 2)]
    by_horovod = Launch(
        size=3, command=["true"], hosts=hosts, launcher_args="--verbose -i 'my key'"
    )
    assert by_horovod._words() == [
        *("/bin/horovodrun", "-np", "3", "-H", "a:1,b:2", "--verbose", "-i", "my key")
    ]
    by_mpi = Launch(size=3, command=["true"], hosts=hosts, mpi=True)
    assert by_mpi._words() == ["/bin/mpiexec", "-n", "3", "-host", "a:1,b:2"]
    with pytest.raises(SettingError, match="No closing quotation"):
        Launch(size=1, command=["true"], launcher_args="'")._words()


def test_open_mpi_is_told_what_other_hosts_need(monkeypatch, tmp_path):
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text("#!/bin/sh\necho 'mpiexec (Open MPI) 4.1.6'\n")
    mpiexec.chmod(0o755)
    monkeypatch.setattr(launch, "find", lambda name: str(mpiexec))
    monkeypatch.setattr(launch, "addresses", lambda hosts: ["10.0.0.1"])
    words = Launch(size=1, command=["true"], hosts=[Host("a", 1)], mpi=True)._words()
    assert words[-2:] == ["-x", "ORCHESTRATOR_LAUNCH"]


@pytest.mark.parametrize(("name", "told"), [("horovodrun", "make setup"), ("mpiexec", r"\[mpi\]")])
def test_no_launcher(monkeypatch, tmp_path, name, told):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match=f"{name} is not on the PATH.*{told}"):
        launch.find(name)


def run_one(*launcher: str, command: str = "exit 3") -> Outcome:
    """One rank without MPI or Horovod: `env` starts it, whose rank is 0."""
    job = Job(1, launcher, ["sh", "-c", command], ["127.0.0.1"], 5.0)
    return asyncio.run(asyncio.wait_for(job.run(), 20))


def test_one_rank():
    assert run_one("env") == Outcome(3, "rank 0 ended with 3, the first to fail", 0)


def test_who_does_not_know_the_secret_is_no_rank(capfd):
    lie = 'ORCHESTRATOR_LAUNCH="wrong$ORCHESTRATOR_LAUNCH" exec "$@"'
    outcome = run_one("sh", "-c", lie, "sh")
    assert outcome == Outcome(1, "sh ended with 1 before all ranks had started")
    assert "rank 0 on" in (told := capfd.readouterr().err)
    assert "cannot reach the launcher at 127.0.0.1:" in told


def test_a_rank_of_another_job_is_no_rank():
    outcome = run_one("env", "HOROVOD_RANK=1")
    assert outcome == Outcome(1, "env ended with 1 before all ranks had started")


def test_what_a_rank_leaves_is_ended(tmp_path):
    file = tmp_path / "pid"
    assert run_one("env", command=f"sleep 600 & echo $! > {file}") == Outcome(0, "")
    left = Path(f"/proc/{file.read_text().strip()}/stat")
    # Whoever adopted it may not have collected it.
    assert not left.exists() or left.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_bad_arguments_are_one_line():
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", "launch"]
    words = ["-np", "2", "-H", "node1", "--", "true"]
    result = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert result.stderr == (
        "orchestrator: -H node1: 'node1' is not a host and how many ranks it takes; "
        "write node1:4,node2:4.\n"
    )
