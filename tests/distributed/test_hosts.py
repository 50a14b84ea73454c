"""Ranks on two hosts, joined by ssh and a network that can be cut; see tests/hosts.py.

The figures of docs/reliability.md: `python -m pytest -rP tests/distributed/test_hosts.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import hosts, namespaces
from tests.distributed import launcher
from tests.distributed.test_train import SPY

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing()),
]

TIMEOUT = 10
WORDS = [
    *("launch/train.py", "model.factory=tests.distributed.holding:model"),
    *("run.deterministic=true", "train.epochs=4"),
    *("checkpoint.every_steps=10", "checkpoint.keep_last=2", f"run.timeout={TIMEOUT}"),
]
TRAIN = [sys.executable, *WORDS]
HOROVODRUN = [launcher.executable("horovodrun"), "-np", "4", "-H", "host1:2,host2:2", *TRAIN]
MPIEXEC = [launcher.executable("mpiexec"), "-n", "4", "-hosts", "host1:2,host2:2", *TRAIN]
LAUNCH = [launcher.executable("orchestrator"), "launch", "-np", "4", "-H", "host1:2,host2:2"]


@pytest.fixture
def net(tmp_path):
    with hosts.Network(tmp_path / "net", ["host1", "host2"]) as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What four ranks on one host come to."""
    folder = tmp_path_factory.mktemp("alone")
    words = [*WORDS, f"run.dir={folder / 'run'}"]
    finished = launcher.launch("horovod", 4, words, folder)
    assert finished.returncode == 0, finished.output
    return came_to(folder / "run")


def held(hold: Path, job) -> None:
    """When all ranks hold still after the same step."""
    namespaces.wait(lambda: len(list(hold.iterdir())) == 4, "all ranks' step", 120, job)


@contextlib.contextmanager
def started(net, folder: Path, command: list[str], **env: str):
    """A job from host1; whatever goes wrong, its output is shown."""
    log = folder / "launcher.log"
    words = [*command, f"run.dir={folder / 'run'}"]
    try:
        with net.running("host1", words, log, launcher.ROOT, launcher.environment(**env)) as job:
            yield job
    except BaseException:
        print(log.read_text("utf-8", "replace")[-8000:])
        raise


def finished(net, folder: Path, command: list[str], **env: str) -> str:
    """A job that is to end well; what it printed."""
    with started(net, folder, command, **env) as job:
        assert job.wait(300) == 0
        assert_nothing_left(net)
    return (folder / "launcher.log").read_text("utf-8", "replace")


def came_to(run: Path) -> tuple[str, str, list[tuple]]:
    """The weights' digest, history.csv and the decisions of a run that ended well."""
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (end,) = [event for event in events if event["kind"] == "end"]
    assert end["ranks_alike"] == 4
    kinds = ("best", "plateau", "stop", "restore", "end")
    decisions = [(e["kind"], e["epoch"], e["step"]) for e in events if e["kind"] in kinds]
    return end["weights"], (run / "history.csv").read_text(), decisions


def committed(run: Path) -> list[int]:
    return sorted(int(one.parent.name[5:]) for one in run.glob("checkpoints/step-*/manifest.json"))


def assert_nothing_left(net, seconds: float = 10.0) -> None:
    for host in ("host1", "host2"):
        namespaces.wait(
            lambda host=host: not net.processes(host), f"the end of all on {host}", seconds
        )


def ranks(net, host: str) -> list[int]:
    """The ranks on a host."""
    command = " ".join(TRAIN)
    return [pid for pid, line in net.processes(host).items() if line.startswith(command)]


def others(net, host: str, stays: str) -> list[str]:
    """What is on a host and does not begin so."""
    return [line for line in net.processes(host).values() if not line.startswith(stays)]


def test_two_hosts_train_as_one_does(net, tmp_path, alone):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SPY)
    run, writes = tmp_path / "run", tmp_path / "writes.log"
    path = f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"
    hold = tmp_path / "hold"
    hold.mkdir()
    env = {"PYTHONPATH": path, "WATCHED": str(run), "WATCH_LOG": str(writes), "HOLD": str(hold)}
    with started(net, tmp_path, HOROVODRUN, **env) as job:
        held(hold, job)
        for host in ("host1", "host2"):
            assert len(ranks(net, host)) == 2, net.processes(host)
        (hold / "go").touch()
        assert job.wait(300) == 0
        assert_nothing_left(net)
    assert came_to(run) == alone
    assert {line.split()[0] for line in writes.read_text().splitlines()} == {"0"}


def cut_off(net, folder: Path, command: list[str], stays: str = "sshd:") -> tuple[str, dict]:
    """Cuts host2 off in mid-training; what the launcher printed, and outcome.json.

    Only sshd may stay on host2, which cannot know that the other side has gone, and nothing on
    host1 but what begins with `stays`.
    """
    run, hold = folder / "run", folder / "hold"
    hold.mkdir()
    with started(net, folder, command, HOLD=str(hold)) as job:
        held(hold, job)
        net.cut("host2")
        (hold / "go").touch()
        cut = time.monotonic()
        namespaces.wait(lambda: not ranks(net, "host2"), "the end of host2's ranks", TIMEOUT + 30)
        there = time.monotonic() - cut
        assert job.wait(TIMEOUT + 30) != 0
        here = time.monotonic() - cut
        namespaces.wait(lambda: not others(net, "host1", stays), "the end of all on host1", 20)
        namespaces.wait(lambda: not others(net, "host2", "sshd:"), "the end of all on host2", 60)
        gone = time.monotonic() - cut
    said = (folder / "launcher.log").read_text("utf-8", "replace")
    print(f"after the cut: host2's ranks ended in {there:.1f} s, the job in {here:.1f} s")
    print(f"nothing left on host2 in {gone:.1f} s")
    print("\n".join(re.findall(r"^.*A wait for other(?:.*\n){6}", said, re.MULTILINE)))
    assert committed(run)
    return said, json.loads((run / "outcome.json").read_text())


def test_a_cut_is_told_on_both_sides_and_gone_on_from(net, tmp_path, alone):
    said, outcome = cut_off(net, tmp_path, HOROVODRUN)
    assert outcome["exit_code"] == 70
    (told,) = re.findall(
        r"A wait for other ranks took too long \(run.timeout=10 s\)(?:.*\n){6}", said
    )
    for rank, host in enumerate(["host1", "host1", "host2", "host2"]):
        # On the disk that they share; what host2 prints cannot arrive.
        file = tmp_path / "run" / "faults" / f"rank-{rank}.txt"
        for text in (file.read_text(), outcome["reason"], told):
            assert f"rank {rank} ({host}, " in text
    net.restore("host2")
    assert_nothing_left(net, 60)
    assert "Continuing at epoch" in finished(net, tmp_path, HOROVODRUN)
    assert came_to(tmp_path / "run") == alone


@pytest.mark.parametrize("mpi", [False, True], ids=["horovod", "mpi"])
def test_a_host_that_shares_no_disk_is_named_as_silent(net, tmp_path, mpi):
    run = tmp_path / "run"
    run.mkdir()
    net.hide("host2", run)
    # The ssh that mpiexec started stays until the system gives its connection up.
    words = [*LAUNCH, *["--mpi"] * mpi, "--", *TRAIN]
    said, outcome = cut_off(net, tmp_path, words, "/usr/bin/ssh -x" if mpi else "sshd:")
    assert "orchestrator launch: rank" in said
    assert "Exception in callback" not in said
    silent = (
        f"rank 2, 3: did not speak: stopped, hung or dead, or on a host that does not share {run}"
    )
    assert silent in said
    assert silent in outcome["reason"]
    assert outcome["exit_code"] == 70


def test_launch_ends_with_75_over_two_hosts(net, tmp_path, alone):
    run, hold, command = tmp_path / "run", tmp_path / "hold", [*LAUNCH, "--", *TRAIN]
    hold.mkdir()
    with started(net, tmp_path, command, HOLD=str(hold)) as job:
        held(hold, job)
        net.signal(job, signal.SIGTERM)
        (hold / "go").touch()
        assert job.wait(60) == 75
        assert_nothing_left(net)
    said = json.loads((run / "outcome.json").read_text())
    assert said["exit_code"] == 75
    assert committed(run)[-1] == said["step"]
    finished(net, tmp_path, command)
    assert came_to(run) == alone


def test_mpiexec_starts_ranks_over_ssh(net, tmp_path):
    run, hold = tmp_path / "run", tmp_path / "hold"
    hold.mkdir()
    words = [*MPIEXEC, "train.epochs=2"]
    with started(net, tmp_path, words, HOLD=str(hold)) as job:
        held(hold, job)
        for host in ("host1", "host2"):
            assert len(ranks(net, host)) == 2, net.processes(host)
        (hold / "go").touch()
        assert job.wait(120) == 0
        assert_nothing_left(net)
    assert came_to(run)[2][-1] == ("end", 1, 46)
