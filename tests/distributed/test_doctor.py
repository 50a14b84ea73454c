"""`orchestrator doctor` on real ranks: what it says of them, and how they end."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import launcher

pytestmark = pytest.mark.distributed

LAME = ("-m", "tests.distributed.lame")
SIZES = [4, 65536, 2**20, 2**24]
# What only a sick rank or storage has; the rest may be a small machine's.
SOUND = {"launch", "versions", "horovod", "mpi", "gpus", "sums", "clocks", "storage"}


def report(finished: launcher.Finished) -> dict[str, Any]:
    """The one line of JSON, behind `[0]<stdout>:` under horovodrun."""
    (line,) = [line for line in finished.output.splitlines() if '{"format": 1' in line]
    return json.loads(line[line.index("{") :])


def severities(found: dict[str, Any]) -> dict[str, str]:
    return {one["check"]: one["severity"] for one in found["findings"]}


def launch(backend: str, folder: Path, *words: str, **options: Any) -> launcher.Finished:
    finished = launcher.launch(backend, 2, words, folder, deadline=150, **options)
    assert finished.left == [], launcher.tails(folder)
    return finished


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_two_ranks(backend, tmp_path):
    url = str(tmp_path / "checkpoints")
    words = [*LAME, "-1", "", "--json", "--storage", url, "--dir", str(tmp_path)]
    finished = launch(backend, tmp_path, *words)
    told = launcher.tails(tmp_path)
    assert finished.returncode == 0, told
    assert {f"rank {rank} ends with 0" in finished.output for rank in (0, 1)} == {True}, told
    found = report(finished)
    assert (found["backend"], found["size"], found["exit_code"]) == (backend, 2, 0)
    assert found["hosts"] == {socket.gethostname(): [0, 1]}
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert [rank["local_rank"] for rank in found["ranks"]] == [0, 1]
    assert len({rank["pid"] for rank in found["ranks"]}) == 2
    assert found["ranks"][0]["versions"] == found["ranks"][1]["versions"]
    _check_measured(found)
    assert list(found["storage"]["seconds"]) == ["write", "read", "list", "delete"]
    assert not os.path.exists(url)
    given = severities(found)
    other = "horovod" if backend == "horovod" else "mpi"
    assert SOUND - {"horovod", "mpi"} | {other} <= set(given)
    assert {given[check] for check in SOUND & set(given)} == {"ok"}, told
    assert "problem" not in given.values(), told


def _check_measured(found: dict[str, Any]) -> None:
    sums = [one for one in found["collectives"] if one["what"] == "allreduce"]
    assert [one["bytes"] for one in sums] == SIZES
    others = [one["what"] for one in found["collectives"] if one["what"] != "allreduce"]
    assert others == ["barrier", "broadcast"]
    for one in found["collectives"]:
        assert 0 < one["seconds"] < 30
        assert one["wrong"] == []
        # of two ranks each sends, and gets, as much as there is
        assert one["bus"] == pytest.approx(one["bytes"] / one["seconds"])
    assert found["device"] == "/CPU:0"
    first, second = found["clocks"]
    assert (first["offset"], first["uncertainty"]) == (0, 0)
    # one host, one clock
    assert abs(second["offset"]) <= second["uncertainty"]
    assert second["uncertainty"] < 1


@pytest.mark.parametrize(("backend", "rank"), [("horovod", 1), ("mpi", 0)])
def test_another_version_on_one_rank(backend, rank, tmp_path):
    finished = launch(backend, tmp_path, *LAME, str(rank), "version", "--json")
    told = launcher.tails(tmp_path)
    assert finished.returncode == 1, told
    for each in (0, 1):
        assert f"rank {each} ends with 1" in finished.output, told
    found = report(finished)
    (versions,) = [one for one in found["findings"] if one["check"] == "versions"]
    assert versions["severity"] == "problem"
    assert versions["found"].startswith("keras-orchestrator: ")
    assert f"0.0.1 on rank {rank}" in versions["found"]
    assert versions["todo"]
    assert len(found["collectives"]) == 6, "the rest is measured all the same"


def test_few_files_on_one_rank_are_a_warning(tmp_path):
    finished = launch("mpi", tmp_path, *LAME, "1", "files", "--json")
    assert finished.returncode == 0, launcher.tails(tmp_path)
    (nofile,) = [f for f in report(finished)["findings"] if f["check"] == "nofile"]
    assert nofile["severity"] == "warning"
    assert "512 on rank 1" in nofile["found"]
    assert "ulimit -n 4096" in nofile["todo"]


def test_storage_that_fails_on_rank_0(tmp_path):
    (tmp_path / "file").write_text("x")
    url = str(tmp_path / "file")
    finished = launch("mpi", tmp_path, *LAME, "-1", "", "--json", "--storage", url)
    told = launcher.tails(tmp_path)
    assert finished.returncode == 1, told
    for rank in (0, 1):
        assert f"rank {rank} ends with 1" in finished.output, told
    found = report(finished)
    assert severities(found)["storage"] == "problem"
    assert found["storage"]["failed"] == "write"
    assert "A file is in the way of a folder" in found["storage"]["error"]


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_a_rank_that_fails_by_itself_ends_all(backend, tmp_path):
    # where ranks leave notes of their end
    env = {"TMPDIR": str(tmp_path)}
    finished = launch(backend, tmp_path, *LAME, "1", "raise", "--json", env=env)
    told = launcher.tails(tmp_path)
    assert finished.returncode not in (0, None), told
    assert "ZeroDivisionError" in finished.output, told
    assert finished.seconds < 100, told


def test_ranks_that_cannot_join(tmp_path):
    words = [*LAME, "-1", "", "--json", "--backend", "horovod", "--storage", str(tmp_path)]
    finished = launch("mpi", tmp_path, *words)
    told = launcher.tails(tmp_path)
    assert finished.returncode == 1, told
    found = report(finished)
    assert "The launcher started 2 ranks" in found["apart"]
    assert severities(found)["launch"] == "problem"
    assert (found["collectives"], found["storage"]) == ([], None)
    where = f"orchestrator doctor: rank 1 on {socket.gethostname()}: The launcher started 2 ranks"
    assert where in finished.output, told
