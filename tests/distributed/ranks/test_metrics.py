"""Global metrics are those of one process on all the data."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import orchestrator
from orchestrator import callbacks
from orchestrator.runtime import Runtime
from tests.distributed import problems
from tests.distributed.rank_plugin import several

METRICS = {
    "accuracy": lambda: keras.metrics.CategoricalAccuracy(name="accuracy"),
    "auc": lambda: keras.metrics.AUC(multi_label=True, num_labels=10, name="auc"),
    "f1": lambda: keras.metrics.F1Score(average="macro", name="f1"),
    "iou": lambda: keras.metrics.OneHotMeanIoU(num_classes=10, sparse_y_pred=False, name="iou"),
    "r2": lambda: keras.metrics.R2Score(name="r2"),
    "top": lambda: keras.metrics.TopKCategoricalAccuracy(k=3, name="top"),
}


def compiled(runtime):
    model = problems.mlp(16, activation="tanh")
    model.compile(
        runtime.distribute(keras.optimizers.SGD(0.0)),  # the weights stay, so losses compare
        "categorical_crossentropy",
        metrics=[make() for make in METRICS.values()],
    )
    return model


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def names(history, prefix):
    last = {name: values[-1] for name, values in history.items()}
    validation = {n[4:]: v for n, v in last.items() if n.startswith("val_")}
    return validation if prefix else {n: v for n, v in last.items() if not n.startswith("val_")}


@pytest.mark.parametrize("count", [101, 1])
def test_fit_reports_global_metrics(runtime, communicator, count):
    training, validation = problems.digits(193, one_hot=True), problems.digits(count, 200, True)
    model = compiled(runtime)
    runtime.broadcast(model)
    history = model.fit(
        runtime.shard(training, batch_size=64),
        validation_data=runtime.shard(validation, batch_size=64),
        epochs=2,
        verbose=0,
        callbacks=[callbacks.GlobalMetrics()],
    ).history
    alone = compiled(problems.alone())
    for data, prefix in ((training, ""), (validation, "val_")):
        whole = alone.evaluate(*data, batch_size=64, verbose=0, return_dict=True)
        close(names(history, prefix), whole)
    assert all(h == history for h in communicator.allgather_object(history))


@pytest.mark.parametrize("count", [101, 1])
def test_evaluate_equals_one_process(runtime, communicator, count):
    x, y = problems.digits(count, one_hot=True)
    model = compiled(runtime)
    counting: Any = problems.Counting(communicator)
    with Runtime(counting).use():
        ours = orchestrator.evaluate(model, runtime.shard((x, y), batch_size=64))
    assert counting.calls == (["allreduce"] if runtime.size > 1 else [])
    close(ours, compiled(problems.alone()).evaluate(x, y, 64, verbose=0, return_dict=True))
    assert all(other == ours for other in communicator.allgather_object(ours))


@several
@pytest.mark.parametrize(("chosen", "buckets"), [(["accuracy"], 3), ([*METRICS], 1)])
def test_collectives_are_counted(runtime, communicator, chosen, buckets, monkeypatch):
    counting: Any = problems.Counting(communicator)
    sums = []
    if runtime.backend == "mpi":
        real = communicator._sum
        monkeypatch.setattr(communicator, "_sum", lambda flat: sums.append(1) or real(flat))
    with Runtime(counting, gradient_buckets=buckets).use() as counted:
        model = problems.mlp(32, 32, 32)
        model.compile(
            counted.distribute(keras.optimizers.Adam()),
            "categorical_crossentropy",
            metrics=[METRICS[name]() for name in chosen],
        )
        counted.broadcast(model)
        training = counted.shard(problems.digits(160, one_hot=True), batch_size=32)
        validation = counted.shard(problems.digits(50, 200, True), batch_size=32)
        ours = [
            callbacks.EarlyStopping(patience=9),
            callbacks.ReduceLROnPlateau(patience=9),
            callbacks.GlobalMetrics(),
        ]
        counting.calls.clear()
        model.fit(training, validation_data=validation, epochs=3, verbose=0, callbacks=ours)
    # One self-test, one collective an epoch, and the graph's own, where a trace has one call.
    assert counting.calls.count("allgather_object") == 1
    assert counting.calls.count("allreduce") == 3
    assert set(counting.calls) == {"allgather_object", "allreduce", "sum_gradients"}
    assert set(counting.buckets) == {buckets}
    assert counting.calls.count("sum_gradients") <= 2  # traced again where metrics are built
    if runtime.backend == "mpi":
        assert len(sums) == 3 * 5 * buckets  # epochs, steps, buckets
