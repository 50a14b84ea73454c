"""A rank that fails ends the whole job, soon, and says why."""

from __future__ import annotations

import time

import pytest

from tests.distributed import launcher

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_a_rank_that_raises_ends_the_job(backend, rank, tmp_path):
    command = ["-m", "tests.distributed.failing", str(rank), "raise"]
    finished = launcher.launch(backend, 3, command, tmp_path, deadline=120)
    end = time.time()
    told = launcher.tails(tmp_path)
    assert finished.returncode not in (0, None), told
    assert f"OutOfLuck: rank {rank} of 3 is out of luck" in finished.output, told
    assert "in on_train_batch_end" in finished.output, told
    assert finished.left == [], told
    raised = _raised_at(finished.output)
    print(f"{backend}, rank {rank}: the job ended {end - raised:.1f} s after the error")
    assert end - raised < 30


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_a_rank_that_is_killed_ends_the_job(backend, tmp_path):
    command = ["-m", "tests.distributed.failing", "1", "kill"]
    finished = launcher.launch(backend, 2, command, tmp_path, deadline=120)
    assert finished.returncode not in (0, None), launcher.tails(tmp_path)
    assert finished.left == []


def test_the_deadline_ends_everything(tmp_path):
    begin = time.monotonic()
    command = ["-c", "import time; print('waits', flush=True); time.sleep(600)"]
    finished = launcher.launch("mpi", 2, command, tmp_path, deadline=3)
    assert finished.returncode is None
    assert finished.output.count("waits") == 2
    assert len(finished.left) >= 3  # the launcher and its ranks; none of them any more
    assert time.monotonic() - begin < 30


def _raised_at(output: str) -> float:
    line = next(line for line in output.splitlines() if "RAISED AT" in line)
    return float(line.split("RAISED AT")[1].split()[0])
