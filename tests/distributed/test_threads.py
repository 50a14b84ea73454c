"""The threaded backend and the single one keep the contract, and the threaded one is loud."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from orchestrator.communicators.single import SingleCommunicator
from tests.distributed import contract, threads


@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
def test_single(check):
    check(SingleCommunicator())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
def test_threads(check, size):
    threads.run(size, check)


def test_results_come_in_rank_order():
    assert threads.run(3, lambda c: c.rank * 10) == [0, 10, 20]


def test_the_first_error_wakes_the_others_and_is_raised():
    def function(communicator):
        if communicator.rank == 1:
            raise LookupError("rank one's own")
        communicator.barrier()

    begin = time.monotonic()
    with pytest.raises(LookupError, match="rank one's own") as caught:
        threads.run(3, function)
    assert time.monotonic() - begin < 5
    notes = "\n".join(caught.value.__notes__)
    assert "Raised on rank 1 of 3" in notes
    assert notes.count("BrokenBarrierError") == 2


def test_a_rank_that_is_late_is_named():
    release = threading.Event()

    def function(communicator):
        if communicator.rank == 0:
            release.wait(20)

    with pytest.raises(TimeoutError, match=r"rank-0:[\s\S]*release\.wait"):
        threads.run(2, function, deadline=0.3)
    release.set()


@pytest.mark.parametrize(
    "function",
    [
        lambda c: c.barrier() if c.rank else c.allgather_object(1),
        lambda c: c.allreduce(np.zeros(2 + c.rank)),
        lambda c: c.allreduce(np.zeros(2, "float32" if c.rank else "float64")),
        lambda c: c.broadcast(np.zeros(2), c.rank),
    ],
    ids=["collective", "shape", "dtype", "root"],
)
def test_calls_that_differ_are_an_error(function):
    with pytest.raises(RuntimeError, match="different collective calls"):
        threads.run(2, function)
