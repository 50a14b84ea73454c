"""What measuring each rank's time, and `Stragglers`, add to a training step.

    mpiexec -n 2 python benchmarks/stragglers.py

Two models of one shape train in turns, a step each, one of them measured; the ratio is the median
over neighbours, of the slowest rank of each step.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import orchestrator
from orchestrator import callbacks, optimizer, steps
from orchestrator.times import Times

BATCH = 32
WARM_UP = 20


class Unmeasured(Times):
    """Notes nothing."""

    def begin(self, steps: int) -> None:
        pass

    def arrived(self, data: Any) -> None:
        pass

    def reducing(self, own: Any, reduce: Callable[[], Any]) -> Any:
        return reduce()


def stepper(runtime: orchestrator.Runtime, units: int, measured: bool) -> Callable[[], None]:
    """One training step of a new model."""
    layers = [keras.layers.Dense(units, "relu") for _ in range(4)]
    model = keras.Sequential([keras.Input((units,)), *layers, keras.layers.Dense(10)])
    adam = keras.optimizers.Adam(1e-4)
    if not measured:
        optimizer.distribute(adam, runtime.communicator, flags=runtime.flags)
        steps.prepare(model, runtime.communicator, runtime.say, Unmeasured(runtime.times._waits))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(runtime.distribute(adam), loss)
    runtime.broadcast(model)
    watch = callbacks.Stragglers()
    watch.set_model(model)
    watch.on_train_begin()
    x = np.random.default_rng(runtime.rank).normal(size=(BATCH, units)).astype("float32")
    options = tf.data.Options()
    options.autotune.enabled = False
    part = tf.data.Dataset.from_tensors((x, np.zeros(BATCH, "int32"))).repeat()
    iterator = iter(part.with_options(options))
    model.make_train_function()

    def step() -> None:
        model.train_function(iterator)
        if measured:
            watch.on_train_batch_end(0)

    return step


def seconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--turns", type=int, default=2000)
    asked = parser.parse_args()
    runtime = orchestrator.init(seed=1)
    for units in (64, 512):
        with_, without = (stepper(runtime, units, measured) for measured in (True, False))
        for _ in range(WARM_UP):
            with_()
            without()
        turns = np.zeros((asked.turns, 2))
        for turn in range(asked.turns):
            for which in (0, 1) if turn % 2 else (1, 0):
                turns[turn, which] = seconds((with_, without)[which])
        slowest = np.max(runtime.communicator.allgather_object(turns), 0)
        low, ratio, high = np.percentile(slowest[:, 0] / slowest[:, 1], [25, 50, 75])
        measured, usual = np.median(slowest, 0)
        runtime.say(
            f"{runtime.size} ranks under {runtime.backend}, dense 4 x {units}: a step takes "
            f"{usual * 1e3:.2f} ms, measured {ratio:.4f} of it [{low:.3f}, {high:.3f}]; medians "
            f"{(measured - usual) * 1e6:.0f} us apart ({measured / usual - 1:.2%})"
        )


if __name__ == "__main__":
    main()
