"""Global metrics are those of one process on all the data."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import orchestrator
from orchestrator import callbacks, metrics
from orchestrator.runtime import Runtime
from tests import metric_cases
from tests.distributed import problems
from tests.distributed.rank_plugin import once, several, three

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


@pytest.mark.parametrize("count", [101, pytest.param(1, marks=three)])
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


@pytest.mark.parametrize("count", [101, pytest.param(1, marks=three)])
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
@pytest.mark.parametrize(
    ("chosen", "buckets"), [pytest.param(["accuracy"], 3, marks=three), ([*METRICS], 1)]
)
def test_collectives_are_counted(runtime, communicator, chosen, buckets, monkeypatch):
    counting: Any = problems.Counting(communicator)
    sums = []
    if runtime.backend == "mpi":
        real = communicator.inner._sum
        monkeypatch.setattr(communicator.inner, "_sum", lambda flat: sums.append(1) or real(flat))
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


@three
@pytest.mark.filterwarnings("ignore:.*Falling back to standard R2 score:UserWarning")
def test_every_metric_in_one_collective(runtime, communicator, note):
    """All cases on uneven parts."""
    counts = metric_cases.PARTS["uneven"][runtime.size]
    begin = sum(counts[: runtime.rank])
    model = metric_cases.AllMetrics()
    model.update(begin, begin + counts[runtime.rank])
    counting: Any = problems.Counting(communicator)
    (state,) = metrics.global_states(counting, model, [metrics.snapshot(model)])
    assert counting.calls == ["allreduce"]
    ours = metrics.results(model, state)
    everyone = communicator.allgather_object({name: np.asarray(v) for name, v in ours.items()})
    for other in everyone[1:]:
        assert all(np.array_equal(other[name], value) for name, value in everyone[0].items())
    if runtime.is_root:
        for case in metric_cases.CASES:
            whole = metric_cases.alone(case, sum(counts))
            error = metric_cases.relative_error(ours[case.name], whole)
            note("worst_relative_error_of_a_metric", error)
            assert error <= 1e-6, (case.name, ours[case.name], whole)


class Largest(keras.metrics.Metric):
    """The largest prediction, which does not say how ranks combine."""

    def __init__(self) -> None:
        super().__init__(name="largest")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

    def result(self):
        return self.value + 0  # the variable itself would change later


class MergedLargest(Largest):
    """And one that does."""

    def merge_state(self, states):
        return [np.maximum.reduce(arrays) for arrays in zip(*states, strict=True)]


def two_outputs(runtime, *own):
    """Predicts the digit and the brightness; all its weights are fixed."""
    m = keras.metrics
    fixed = {"kernel_initializer": keras.initializers.GlorotUniform(seed=3)}
    x = keras.Input((64,))
    outputs = {
        "digit": keras.layers.Dense(10, activation="softmax", name="digit", **fixed)(x),
        "light": keras.layers.Dense(2, name="light", **fixed)(x),
    }
    model = keras.Model(x, outputs)
    model.compile(
        runtime.distribute(keras.optimizers.SGD(0.0)),
        loss={"digit": "categorical_crossentropy", "light": "mse"},
        loss_weights={"digit": 0.7, "light": 2.0},
        metrics={
            "digit": ["accuracy", m.AUC(name="auc"), m.F1Score(average="weighted", name="f1")],
            "light": [m.RootMeanSquaredError(name="rmse"), m.R2Score(name="r2"), *own],
        },
        weighted_metrics={
            "digit": [m.CategoricalCrossentropy(name="wce"), m.Recall(name="wrecall")],
            "light": ["mae"],
        },
    )
    return model


def weighted_digits(count, start=0):
    x, y = problems.digits(count, start, one_hot=True)
    # Around 0, since R2Score multiplies rounding where targets are far from it.
    light = 10 * np.stack([x.mean(1) - 0.3, x[:, :32].mean(1) - 0.3], 1)
    weights = np.linspace(0.5, 2.0, count, dtype="float32")
    return x, {"digit": y, "light": light}, {"digit": weights, "light": weights[::-1].copy()}


def test_a_model_of_several_outputs_equals_one_process(runtime, note):
    training, validation = weighted_digits(128), weighted_digits(65, 200)
    model = two_outputs(runtime, MergedLargest())
    runtime.broadcast(model)
    history = model.fit(
        runtime.shard(training, batch_size=64),
        validation_data=runtime.shard(validation, batch_size=65),
        verbose=0,
        callbacks=[callbacks.GlobalMetrics()],
    ).history
    alone = two_outputs(problems.alone(), MergedLargest())
    for (x, y, weight), prefix, batch in ((training, "", 64), (validation, "val_", 65)):
        whole = alone.evaluate(x, y, batch, 0, weight, return_dict=True)
        assert len(whole) == 12
        for name, value in whole.items():
            error = metric_cases.relative_error(history[f"{prefix}{name}"][0], value)
            note("worst_relative_error_of_a_model", error)
            assert error <= 1e-6, (prefix, name, history[f"{prefix}{name}"], value)


@several
@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=once)])
def test_metrics_built_in_a_step_without_samples(runtime, eager):
    """The first batch that a rank sees has nothing for it."""
    x, y = problems.digits(1, one_hot=True)
    results = []
    for place in (runtime, problems.alone()):
        model = problems.mlp(8)
        given = [keras.metrics.CategoricalCrossentropy(), "mae", keras.metrics.F1Score("macro")]
        model.compile(loss="mse", metrics=given, run_eagerly=eager)
        with place.use():
            results.append(orchestrator.evaluate(model, place.shard((x, y), batch_size=4)))
    close(*results)


@three
def test_a_metric_that_does_not_add_up_is_refused_on_all_ranks(runtime, communicator):
    x, y = problems.digits(8, one_hot=True)
    model = problems.mlp(8)
    model.compile(loss="mse", metrics=[Largest()])
    with pytest.raises(ValueError, match=r"(?s)'largest' of class Largest.*merge_state") as error:
        orchestrator.evaluate(model, runtime.shard((x, y), batch_size=8))
    texts = communicator.allgather_object(str(error.value))
    assert texts == [texts[0]] * runtime.size
