"""Data that end early on one rank end the whole job with a message, and soon."""

from __future__ import annotations

import time

import pytest

from tests.distributed import launcher

pytestmark = pytest.mark.distributed

PLANNED = "The data of rank {} ended early: 6 global batches were planned for one pass and 4 came"
CASES = [
    ("mpi", 1, "generator", PLANNED),
    ("horovod", 0, "generator", PLANNED),
    ("mpi", 0, "unknown", PLANNED),
    ("horovod", 2, "unknown", PLANNED),
    ("mpi", 2, "promised", "expected to contain 6 elements but contained only 4"),
    ("horovod", 1, "py-dataset", "IndexError: batch 4 of 4"),
]


@pytest.mark.parametrize(("backend", "rank", "how", "message"), CASES)
def test_data_that_end_early_end_the_job(backend, rank, how, message, tmp_path):
    command = ["-m", "tests.distributed.short", str(rank), how]
    finished = launcher.launch(backend, 3, command, tmp_path, deadline=120)
    end = time.time()
    told = launcher.tails(tmp_path)
    assert finished.returncode not in (0, None), told
    assert message.format(rank) in finished.output, told
    assert "NOBODY NOTICED" not in finished.output, told
    assert finished.left == [], told
    line = next(line for line in finished.output.splitlines() if "RAN OUT AT" in line)
    seconds = end - float(line.split("RAN OUT AT")[1].split()[0])
    print(f"{backend}, rank {rank}, {how}: the job ended {seconds:.1f} s after the data")
    assert seconds < 30
