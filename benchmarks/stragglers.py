"""What measuring each rank's time, and `Stragglers`, add to a training step.

    mpiexec -n 2 python benchmarks/stragglers.py

Models of one shape train in turns, a step each, every other one measured: several, since two that
are built alike differ by half a hundredth in where their memory lies. The ratio is the median over
rounds of all models, of the slowest rank of each step. `--same` measures none: the noise.
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
PAIRS = 4


class Unmeasured(Times):
    """Notes nothing."""

    def begin(self, steps: int) -> None:
        pass

    def arrived(self, data: Any) -> Any:
        return data

    def reducing(self, own: Any, reduce: Callable[[Any], Any]) -> Any:
        return reduce(own)


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
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--same", action="store_true", help="measure no model: the noise")
    asked = parser.parse_args()
    runtime = orchestrator.init(seed=1)
    for units in (64, 512):
        kinds = [not asked.same, False] * PAIRS
        made = [stepper(runtime, units, measured) for measured in kinds]
        for step in made * WARM_UP:
            step()
        taken = np.zeros((asked.rounds, len(made)))
        for begin, turn in enumerate(taken):
            for which in np.roll(np.arange(len(made)), begin):
                turn[which] = seconds(made[which])
        slowest = np.max(runtime.communicator.allgather_object(taken), 0)
        measured, usual = slowest[:, ::2].mean(1), slowest[:, 1::2].mean(1)
        low, ratio, high = np.percentile(measured / usual, [25, 50, 75])
        runtime.say(
            f"{runtime.size} ranks under {runtime.backend}, dense 4 x {units}: a step takes "
            f"{np.median(usual) * 1e3:.2f} ms, measured {ratio:.4f} of it "
            f"[{low:.3f}, {high:.3f}]: {(ratio - 1) * np.median(usual) * 1e6:.0f} us"
        )


if __name__ == "__main__":
    main()
