"""The end of an evaluation: one fused allreduce against one a metric; started by horovodrun."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from turns import barrier, fastest, publish, quartiles, slowest

import orchestrator
from orchestrator import metrics
from orchestrator.communicators.base import Op
from orchestrator.communicators.single import SingleCommunicator

COUNTS = (1, 5, 20)


def build(count: int) -> keras.Model:
    """A model that reports `count` numbers: the loss, then built-in metrics."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
    m = keras.metrics
    others = [
        m.BinaryAccuracy(), m.AUC(), m.Precision(), m.Recall(), m.AUC(curve="PR", name="pr"),
        m.TruePositives(), m.FalsePositives(), m.TrueNegatives(), m.FalseNegatives(),
        m.F1Score(threshold=0.5), m.MeanSquaredError(), m.RootMeanSquaredError(),
        m.MeanAbsoluteError(), m.LogCoshError(), m.Poisson(), m.KLDivergence(), m.Hinge(),
        m.PrecisionAtRecall(0.5), m.SensitivityAtSpecificity(0.5),
    ]  # fmt: skip
    model.compile(loss="binary_crossentropy", metrics=others[: count - 1])
    return model


class Clocked(SingleCommunicator):
    """A communicator that notes how long its allreduce took."""

    seconds = 0.0

    def __init__(self, communicator: Any) -> None:
        self._inner = communicator
        self.rank, self.size = communicator.rank, communicator.size

    def allreduce(self, array: np.ndarray, op: Op = "sum") -> np.ndarray:
        begin = time.perf_counter()
        result = self._inner.allreduce(array, op)
        self.seconds = time.perf_counter() - begin
        return result


def contestants(
    model: keras.Model, communicator: Clocked, logs: dict[str, Any]
) -> dict[str, Callable[[], None]]:
    flat = np.concatenate([v.numpy().reshape(-1) for v in model.metrics_variables])
    flat = flat.astype(np.float64)

    def fused() -> None:
        state = metrics.snapshot(model, logs)
        (state,) = metrics.global_states(communicator, model, [state])
        metrics.results(model, state)

    def one_a_metric() -> None:
        for name, value in logs.items():
            hvd.allreduce(tf.constant(value), name=f"bench.{name}").numpy()

    def same_bytes() -> None:
        hvd.allreduce(tf.constant(flat), op=hvd.Sum, name="bench.bytes").numpy()

    def local_results() -> None:
        for value in model.get_metrics_result().values():
            keras.ops.convert_to_numpy(value)

    functions = (fused, one_a_metric, same_bytes, local_results)
    return {function.__name__: function for function in functions}


def measure(runtime: orchestrator.Runtime, count: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each way to end an evaluation; called by all ranks."""
    model = build(count)
    rng = np.random.default_rng(runtime.rank)
    x, y = rng.random((256, 4), np.float32), rng.integers(0, 2, (256, 1)).astype(np.float32)
    logs = model.evaluate(x, y, batch_size=64, verbose=0, return_dict=True)
    communicator = Clocked(runtime.communicator)
    functions = contestants(model, communicator, logs)
    times: dict[str, list[list[float]]] = {name: [] for name in functions}
    begin, go_on, rounds = time.perf_counter(), True, 0
    while go_on:
        names = list(functions)[:: -1 if rounds % 2 else 1]
        for name in names:
            barrier()
            start = time.perf_counter()
            functions[name]()
            total = time.perf_counter() - start
            times[name].append([total, communicator.seconds if name == "fused" else total])
        rounds += 1
        go_on = hvd.broadcast_object(time.perf_counter() - begin < seconds, 0)
    # The first rounds are the first use of many operations.
    known = {name: slowest(rows[2:]) * 1e3 for name, rows in times.items()}
    for name, rows in times.items():
        # A rank that comes early waits in the collective; the last one to come does not.
        known[name][:, 1] = fastest(rows[2:])[:, 1] * 1e3
    return [_row(runtime.size, count, name, known) for name in known]


def _row(ranks: int, count: int, name: str, times: dict[str, np.ndarray]) -> dict[str, Any]:
    """`communication` of the last rank to come; the rest, waiting for it included, is not."""
    own, fused = times[name], times["fused"]
    communicates = name != "local_results"
    return {
        "ranks": ranks,
        "metrics": count,
        "way": name,
        "rounds": len(own),
        "ms": quartiles(own[:, 0]),
        "communication_ms": quartiles(own[:, 1]) if communicates else [],
        "rest_ms": quartiles(own[:, 0] - own[:, 1] * communicates),
        "to_fused": quartiles(own[:, 0] / fused[:, 0]),
        "communication_to_fused": quartiles(own[:, 1] / fused[:, 1]) if communicates else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--seconds", type=float, default=10, help="how long, for each count")
    parser.add_argument("--out", type=Path, help="write JSON there, not to the terminal")
    arguments = parser.parse_args()
    runtime = orchestrator.init("horovod", seed=7)
    rows = [row for n in arguments.metrics for row in measure(runtime, n, arguments.seconds)]
    publish(rows, arguments.out)


if __name__ == "__main__":
    main()
