"""Contestants that train in turns, a few steps each, inside one process a rank."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf


class Turns:
    """Lets each contestant run a few steps, then the next one, forwards and backwards.

    Each contestant has a thread, and only the one whose turn it is runs. What disturbs the machine
    for a second or longer then disturbs all of them alike, and `fit` needs no stopping in between.

    Args:
        steps: Steps a turn.
        seconds: How long to measure; rank 0's clock decides, after whole rounds.
        warm_up: Rounds before that which do not count: tracing, the self-test.
    """

    def __init__(self, *, steps: int, seconds: float, warm_up: int = 4) -> None:
        self._steps = steps
        self._seconds = seconds
        self._warm_up = warm_up
        self._deadline = float("inf")
        self._begin = np.zeros(2)
        self._done = 0
        self.over = False

    def run(self, contestants: dict[str, Callable[[], None]]) -> dict[str, np.ndarray]:
        """Runs all until the time is over; called by all ranks.

        Args:
            contestants: Each trains, calling `step` before each of its steps, until it is false.

        Returns:
            For each an array (turns, 2): seconds by the clock, and of this process's CPU time,
            both the largest of all ranks.
        """
        self._names = list(contestants)
        self._gates = {name: threading.Semaphore(0) for name in contestants}
        self._times: dict[str, list[np.ndarray]] = {name: [] for name in contestants}
        self._queue: list[str] = []
        self._rounds = -1
        threads = [
            threading.Thread(target=self._train, args=(name, train), name=name)
            for name, train in contestants.items()
        ]
        for thread in threads:
            thread.start()
        self._hand_over()
        for thread in threads:
            thread.join()
        return {name: slowest(rows[self._warm_up :]) for name, rows in self._times.items()}

    def _train(self, name: str, train: Callable[[], None]) -> None:
        try:
            self._wait(name)
            train()
            self._names.remove(name)
            self._queue = []
            self._hand_over()
        except BaseException:  # noqa: BLE001 - the other threads would wait for ever
            traceback.print_exc()
            os._exit(1)

    def step(self, name: str) -> bool:
        """Called by the contestant before each step; whether to go on."""
        if self.over:
            return False
        if self._done == self._steps:
            self._times[name].append(_now() - self._begin)
            self._hand_over()
            self._wait(name)
        self._done += 1
        return not self.over

    def _wait(self, name: str) -> None:
        self._gates[name].acquire()
        if not self.over:
            barrier()
        self._done = 0
        self._begin = _now()

    def _hand_over(self) -> None:
        if not self._queue:
            self._new_round()
        if self._queue:
            self._gates[self._queue.pop(0)].release()

    def _new_round(self) -> None:
        self._rounds += 1
        self._queue = self._names[:: -1 if self._rounds % 2 else 1]
        if self._rounds == self._warm_up:
            self._deadline = time.perf_counter() + self._seconds
        if not self.over:
            self.over = hvd.broadcast_object(time.perf_counter() > self._deadline, 0)


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def barrier() -> None:
    """Returns once every rank has called it."""
    hvd.allreduce(tf.zeros(1), name="bench.barrier")


def slowest(times: Sequence[Any] | np.ndarray) -> np.ndarray:
    """The largest of all ranks' values, one by one; called by all ranks."""
    return hvd.allreduce(tf.constant(np.array(times)), op=hvd.Max, name="bench.times").numpy()


def fastest(times: Sequence[Any] | np.ndarray) -> np.ndarray:
    """The smallest of all ranks' values, one by one; called by all ranks."""
    return hvd.allreduce(tf.constant(np.array(times)), op=hvd.Min, name="bench.times").numpy()


def quartiles(values: np.ndarray) -> list[float]:
    """First quartile, median, third quartile; nothing of nothing."""
    if not len(values):
        return []
    return [float(v) for v in np.percentile(values, [25, 50, 75])]


def publish(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Rank 0 writes the rows to a file, or prints one a line."""
    if hvd.rank() != 0:
        return
    if out is None:
        print(*map(json.dumps, rows), sep="\n", flush=True)
    else:
        out.write_text(json.dumps(rows), encoding="utf-8")
