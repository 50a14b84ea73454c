"""What one check of `ConsistencyGuard` costs beside a training step, on the ranks it is started on.

    mpiexec -n 2 python benchmarks/consistency_guard.py

Steps and checks take turns in one run; the ratio is the median of neighbours.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import orchestrator
from orchestrator import callbacks

TURNS = 30
SAMPLES = 256


def model_of(runtime: orchestrator.Runtime, units: int) -> keras.Model:
    layers = [keras.layers.Dense(units, "relu") for _ in range(4)]
    model = keras.Sequential([keras.Input((units,)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(runtime.distribute(keras.optimizers.Adam(1e-4)), loss)
    runtime.broadcast(model)
    return model


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> None:
    runtime = orchestrator.init(seed=1)
    for units in (128, 512, 1024):
        runtime.say(measured(runtime, units))


def measured(runtime: orchestrator.Runtime, units: int) -> str:
    model = model_of(runtime, units)
    guard = callbacks.ConsistencyGuard()
    guard.set_model(model)
    x = np.random.default_rng(runtime.rank).normal(size=(SAMPLES, units)).astype("float32")
    y = np.zeros(SAMPLES, "int32")

    def step() -> None:
        model.train_on_batch(x, y)

    for _ in range(3):
        step()
        guard.check()
    turns = [(seconds(step), seconds(guard.check)) for _ in range(TURNS)]
    each, check = (statistics.median(column) * 1e3 for column in zip(*turns, strict=True))
    ratio = statistics.median(check / step for step, check in turns)
    size = sum(v.numpy().nbytes for v in [*model.weights, *model.optimizer.variables]) / 2**20
    return (
        f"{runtime.size} ranks under {runtime.backend}, {size:.1f} MiB of state: a step "
        f"{each:.1f} ms, a check {check:.1f} ms, {ratio:.2f} of a step; every 100 steps "
        f"{ratio / 100:.2%}"
    )


if __name__ == "__main__":
    main()
