"""`orchestrator launch` around real launchers: signals, exit codes, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.launching import job
from tests.distributed import launcher

pytestmark = pytest.mark.distributed
RANKS = str(Path(__file__).with_name("ranks.py"))
COMMAND = [sys.executable, "-c", "from orchestrator.cli import main; main()", "launch"]
BACKENDS = {"horovod": (), "mpi": ("--mpi",)}
DEADLINE = 60.0
# What a launcher may take to end once its ranks have, and killed ranks to be reported before.
ENDS, REPORTS = job._FAILURE_SECONDS + job._END_SECONDS, job._END_SECONDS


class Launched:
    """A running `orchestrator launch`; ended, with all it started, by the fixture `launch`."""

    def __init__(self, folder: Path, words: list[str], **env: str) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.log = folder / "launcher.log"
        self.begin = time.monotonic()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [*COMMAND, *words],
                cwd=launcher.ROOT,
                env=launcher.environment(**{launcher._MARK: self.mark}, **env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def started(self, count: int = 2) -> list[int]:
        """The ranks' process ids, once so many have started."""
        self.wait_for(lambda: len(self.read("started")) == count)
        return [int(line) for lines in self.read("started") for line in lines]

    def wait_for(self, what) -> None:
        while not what():
            assert time.monotonic() < self.begin + DEADLINE, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.02)

    def read(self, name: str) -> list[list[str]]:
        """The lines of each rank's file of that name, by rank."""
        return [p.read_text().splitlines() for p in sorted(self.folder.glob(f"{name}.*"))]

    def end(self, seconds: float = DEADLINE) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    @property
    def said(self) -> list[str]:
        """The lines that are ours."""
        return re.findall(r"^orchestrator launch: (.*)$", self.output, re.MULTILINE)

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def left(self, grace: float = 0.0) -> list[str]:
        """What still runs, after so many seconds; killed by then."""
        return launcher.end_all(self.mark, grace)


@pytest.fixture
def launch(tmp_path) -> Iterator:
    """Starts ranks that do `what`, and at the end sees that all is gone."""
    with contextlib.ExitStack() as stack:

        def start(backend: str, *what: str, options=(), command=None, **env: str) -> Launched:
            command = command or [sys.executable, RANKS, str(tmp_path), *what]
            words = ["-np", "2", *BACKENDS[backend], *options, "--", *command]
            launched = Launched(tmp_path, words, **env)
            stack.callback(launched.process.wait, 10)
            stack.callback(launched.left)
            return launched

        yield start


@pytest.mark.parametrize(
    ("backend", "number", "seconds"),
    [("horovod", signal.SIGTERM, 6.0), ("mpi", signal.SIGUSR1, 2.0), ("mpi", signal.SIGINT, 0.1)],
)
def test_a_signal_reaches_all_and_leaves_time(launch, backend, number, seconds):
    launched = launch(backend, "checkpoint", str(seconds), options=["--restart", "1"])
    launched.started()
    begin = time.monotonic()
    launched.process.send_signal(number)
    assert launched.end() == 75, launched.output
    took = time.monotonic() - begin
    assert launched.left() == []
    assert seconds <= took < seconds + ENDS
    assert launched.read("saved") == [["whole"], ["whole"]]
    assert launched.read("signals") == [[number.name], [number.name]]
    assert len(launched.said) == 1
    assert re.fullmatch(r"rank \d ended first, with 75: preempted", launched.said[0])


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_a_killed_rank_is_what_failed(launch, backend):
    launched = launch(backend, "fails", "1", "KILL")
    assert launched.end() == 137, launched.output
    assert launched.left() == []
    assert launched.said == ["rank 1 ended by SIGKILL (137), the first to fail"]
    assert launched.read("signals") == [["SIGTERM"]]  # the other's


def test_the_first_failure_counts(launch):
    launched = launch("mpi", "fails", "0", "3")
    assert launched.end() == 3, launched.output
    assert launched.said == ["rank 0 ended with 3, the first to fail"]
    assert launched.left() == []


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_success_says_nothing(launch, backend):
    launched = launch(backend, "reports", options=["-H", "localhost:2"])
    assert launched.end() == 0, launched.output
    assert launched.left() == []
    assert launched.said == []
    for rank in range(2):
        assert f"rank {rank} reads ''" in launched.output
        assert f"rank {rank} sees []" in launched.output


def test_the_grace_ends(launch):
    launched = launch("mpi", "stubborn", options=["--grace", "1"])
    launched.started()
    begin = time.monotonic()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == 137, launched.output
    took = time.monotonic() - begin
    assert launched.left() == []
    assert 1 <= took < 1 + REPORTS + ENDS
    assert len(launched.said) == 1
    assert "was killed, still running 1 s after SIGTERM (--grace)" in launched.said[0]


def test_a_second_signal_ends_at_once(launch):
    launched = launch("mpi", "stubborn")
    launched.started()
    launched.process.send_signal(signal.SIGTERM)
    launched.wait_for(lambda: len(launched.read("signals")) == 2)
    launched.process.send_signal(signal.SIGUSR1)  # says nothing new
    with pytest.raises(subprocess.TimeoutExpired):
        launched.end(0.5)
    launched.process.send_signal(signal.SIGINT)
    assert launched.end(REPORTS + ENDS) == 137, launched.output
    assert launched.left() == []
    assert "was killed, at a second signal, SIGINT" in launched.said[0]


def test_a_signal_before_the_start_starts_nothing(launch):
    launched = launch("horovod", "checkpoint", "0")
    launched.wait_for(lambda: _children(launched.process.pid))
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end(10) == 75, launched.output
    assert launched.left(5) == []
    assert launched.said == ["SIGTERM before the ranks had started"]
    assert launched.read("started") == []


@pytest.mark.parametrize(("backend", "what"), [("mpi", "alone"), ("horovod", "early")])
def test_restarts_what_was_preempted_alone(launch, backend, what):
    launched = launch(backend, what, options=["--restart", "2", "--grace", "1"])
    assert launched.end() == 0, launched.output
    assert launched.left() == []
    assert [len(starts) for starts in launched.read("started")] == [2, 2]
    (line,) = launched.said
    assert line.endswith("ended first, with 75: preempted; restart 1 of 2")


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_no_rank_outlives_a_killed_launch(launch, backend):
    launched = launch(backend, "stubborn", options=["--grace", "1"])
    launched.started()
    launched.process.kill()
    launched.end()
    assert launched.left(8) == []
    assert launched.read("signals") == [["SIGTERM"], ["SIGTERM"]]


@pytest.mark.parametrize("generation", [1, 2])
def test_no_rank_outlives_what_started_it(launch, generation):
    """1: the supervisor, which says no more. 2: the stand-in, the one the launcher sees."""
    launched = launch("mpi", "checkpoint", "0")
    pids = launched.started()
    os.kill(_ancestor(pids[1], generation), signal.SIGKILL)
    code = launched.end(15)
    assert launched.left() == []
    assert code == (1 if generation == 1 else 9), launched.output  # 9 is what mpiexec makes of it
    if generation == 1:
        assert launched.said[0].startswith("rank 1 was lost")


def test_no_rank_outlives_the_launcher_beneath(launch):
    launched = launch("mpi", "stubborn")
    launched.started()
    (mpiexec,) = _children(launched.process.pid)
    os.kill(mpiexec, signal.SIGKILL)
    assert launched.end(15) == 137, launched.output
    assert launched.left(2) == []


def test_a_command_that_is_not_there(launch):
    launched = launch("mpi", command=["nonesuch"])
    assert launched.end() == 127, launched.output
    assert launched.left() == []
    (line,) = launched.said
    assert "cannot start 'nonesuch': No such file or directory" in line


def test_mpi_abort_keeps_its_code(launch):
    launched = launch("mpi", "aborts", "5")
    assert launched.end() == 5, launched.output
    assert launched.left() == []
    assert launched.said == ["mpiexec killed the ranks, as MPI_Abort has it do, and ended with 5"]


def test_other_hosts_reach_back(launch, tmp_path):
    """With an `ssh` that goes nowhere: nothing but what it is told crosses over."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift 2\nexec env -i PATH="$PATH" sh -c "$*"\n')
    ssh.chmod(0o755)
    options = ["-H", "node-a.invalid:1,node-b.invalid:1", "--launcher-args"]
    options += [f"-launcher ssh -launcher-exec {ssh}"]
    launched = launch("mpi", "checkpoint", "0", options=options)
    launched.started()
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == 75, launched.output
    assert launched.left() == []
    assert launched.read("saved") == [["whole"], ["whole"]]


def _children(pid: int) -> list[int]:
    """Of a process, in all its threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def _ancestor(pid: int, generation: int) -> int:
    for _ in range(generation):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return pid
