"""How long ranks take to talk, and how far apart their clocks are."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from orchestrator import waits
from orchestrator.communicators.base import Communicator
from orchestrator.doctor.report import Clock, Timing

KIB, MIB = 2**10, 2**20
# Bytes, and how often each is timed: a second or two in all on one host.
SIZES = {4: 20, 64 * KIB: 20, MIB: 10, 16 * MIB: 5}
_WARM_UP = 2
_CLOCK_ROUNDS = 20


def collectives(communicator: Communicator, device: str) -> list[Timing]:
    """Times a barrier, sums as training makes them, and a broadcast; called by all ranks.

    Args:
        communicator: Two ranks or more.
        device: Where the tensors are, such as `"/GPU:0"`.
    """
    largest = max(SIZES)
    everything = np.zeros(largest, np.uint8)
    found = [_timed(communicator, "barrier", 0, SIZES[4], communicator.barrier)]
    found += [_summed(communicator, size, repeats, device) for size, repeats in SIZES.items()]

    def broadcast() -> None:
        communicator.broadcast(everything)

    return [*found, _timed(communicator, "broadcast", largest, SIZES[largest], broadcast)]


def _summed(communicator: Communicator, size: int, repeats: int, device: str) -> Timing:
    with tf.device(device):
        tensor = tf.fill([size // 4], float(communicator.rank + 1))
    total = communicator.size * (communicator.size + 1) / 2
    wrong = False

    def add() -> None:
        nonlocal wrong
        with tf.device(device):
            ((result,),) = communicator.sum_gradients([[tensor]], f"doctor.{size}")
        wrong = wrong or float(result[-1]) != total  # and waits for the device

    return _timed(communicator, "allreduce", size, repeats, add, lambda: wrong)


def _timed(
    communicator: Communicator,
    what: str,
    size: int,
    repeats: int,
    function: Callable[[], None],
    wrong: Callable[[], bool] = lambda: False,
) -> Timing:
    """All ranks begin together, after a barrier; the slowest rank's median counts."""
    noted = waits.of(communicator)
    seconds = []
    for _ in range(_WARM_UP + repeats):
        communicator.barrier()
        begin = time.perf_counter()
        # A sum of gradients is not watched by itself.
        with contextlib.nullcontext() if noted is None else noted.on(f"{what} of {size} bytes"):
            function()
        seconds.append(time.perf_counter() - begin)
    everyone = communicator.allgather_object((statistics.median(seconds[_WARM_UP:]), wrong()))
    slowest = max(median for median, _ in everyone)
    n = communicator.size
    moved = size * (2 * (n - 1) / n if what == "allreduce" else 1)
    return Timing(
        what=what,
        bytes=size,
        repeats=repeats,
        seconds=slowest,
        bus=moved / slowest,
        wrong=[rank for rank, (_, is_wrong) in enumerate(everyone) if is_wrong],
    )


def clocks(communicator: Communicator) -> list[Clock]:
    """How far each rank's clock is ahead of rank 0's; called by all ranks, the same on all."""
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        before = time.time()
        communicator.barrier()
        rounds.append((before, time.time()))
    everyone = communicator.allgather_object(rounds)
    return [offset(rank, everyone[0], theirs) for rank, theirs in enumerate(everyone)]


def offset(
    rank: int, root: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]
) -> Clock:
    """A clock's offset from what it and rank 0's showed before and after the same barriers.

    Nobody leaves a barrier before all have entered it. So this rank's clock, less its offset,
    was at most the root's when that left, and at least when that entered, in every round. The
    offset lies between those bounds: it is known to half of what the quickest barriers take.

    Args:
        rank: Whose.
        root: Rank 0's times before and after each barrier, in seconds.
        theirs: This rank's.
    """
    if rank == 0:
        return Clock(rank=0, offset=0.0, uncertainty=0.0)
    pairs = list(zip(root, theirs, strict=True))
    least = max(before - left for (_, left), (before, _) in pairs)
    most = min(after - entered for (entered, _), (_, after) in pairs)
    # A clock that was set meanwhile has them crossed.
    return Clock(rank=rank, offset=(least + most) / 2, uncertainty=abs(most - least) / 2)
