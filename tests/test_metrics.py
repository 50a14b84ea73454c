"""Metric state: what is read, how it adds up, and that the model's own is left alone."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator.communicators.single import SingleCommunicator
from orchestrator.metrics import MetricState, global_states, reported_names, results, snapshot
from tests.fakes import FakeCommunicator


class Kinds(keras.metrics.Metric):
    """Its state adds up as it is told."""

    def __init__(self, aggregation: str, name: str = "kinds") -> None:
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", aggregation=aggregation, name="value")

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        self.value.assign(keras.ops.sum(y_pred))

    def result(self):
        return self.value

    def reset_state(self) -> None:
        self.value.assign(0.0)


def make(*extra, loss: str = "mse") -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile("sgd", loss, metrics=list(extra))
    return model


def data(rows: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype("float32")
    return x, rng.integers(0, 2, size=(rows, 1)).astype("float32")


def test_snapshot_is_a_copy():
    model = make("mae")
    model.evaluate(*data(10), verbose=0)
    state = snapshot(model)
    before = [v.copy() for v in state.values]
    model.evaluate(*data(6, seed=2), verbose=0)
    for value, kept in zip(state.values, before, strict=True):
        np.testing.assert_array_equal(value, kept)
    assert len(state.values) == len(model.metrics_variables)
    assert state.extras == {}


def test_snapshot_names_what_no_metric_gives():
    model = make("mae")
    logs = model.evaluate(*data(10), verbose=0, return_dict=True)
    state = snapshot(model, {**logs, "gradient_norm": np.float32(1.5)})
    assert state.extras == {"gradient_norm": 1.5}


def test_results_are_those_of_keras_and_leave_the_model_alone():
    model = make("mae", keras.metrics.AUC(name="auc"), keras.metrics.BinaryAccuracy(name="acc"))
    first = model.evaluate(*data(50), verbose=0, return_dict=True)
    state = snapshot(model)
    model.evaluate(*data(20, seed=3), verbose=0)
    own = [v.numpy().copy() for v in model.metrics_variables]
    assert results(model, state) == pytest.approx(first, rel=1e-7)
    assert set(results(model, state)) == {"loss", "mae", "auc", "acc"}
    for variable, value in zip(model.metrics_variables, own, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_uneven_parts_add_up_to_the_whole():
    """Two ranks with 3 and 17 samples give what one with 20 does; averaging would not."""

    def extra():
        f1 = keras.metrics.F1Score(name="f1", threshold=0.5)
        return "mae", keras.metrics.AUC(name="auc"), f1, keras.metrics.R2Score(name="r2")

    model = make(*extra())
    x, y = data(20)
    whole = model.evaluate(x, y, verbose=0, return_dict=True)
    model.evaluate(x[:3], y[:3], verbose=0)
    here = snapshot(model)
    average = results(model, here)
    model.evaluate(x[3:], y[3:], verbose=0)
    there = snapshot(model)
    flat = np.concatenate([v.astype(np.float64).ravel() for v in there.values])
    communicator = FakeCommunicator(reduce=lambda array: array + flat)
    (state,) = global_states(communicator, model, [here])
    assert communicator.calls == ["allreduce"]
    combined = {name: float(np.squeeze(v)) for name, v in results(model, state).items()}
    expected = {name: float(np.squeeze(v)) for name, v in whole.items()}
    assert combined == pytest.approx(expected, rel=1e-5)
    assert len(combined) == 5
    assert average["auc"] != pytest.approx(whole["auc"], rel=1e-2)


@pytest.mark.parametrize(
    ("aggregation", "other", "expected"),
    [("sum", 7.0, 10.0), ("mean", 7.0, 5.0), ("only_first_replica", 0.0, 3.0)],
)
def test_kinds_of_aggregation(aggregation, other, expected):
    """Also where `result()` gives the variable itself, as Keras's guide shows."""
    model = make(Kinds(aggregation))
    model.evaluate(*data(4), verbose=0)
    index = next(i for i, v in enumerate(model.metrics_variables) if "value" in v.path)
    sent = [np.zeros(v.shape, np.float64) for v in model.metrics_variables]
    sent[index] = np.array(other)
    flat = np.concatenate([value.ravel() for value in sent])

    state = snapshot(model)
    state.values[index] = np.array(3.0, np.float32)
    # Beyond the state it sends what it has seen of the metric; the other has seen nothing.
    communicator = FakeCommunicator(
        reduce=lambda array: array + np.pad(flat, (0, array.size - flat.size))
    )
    (combined,) = global_states(communicator, model, [state])
    assert combined.values[index] == expected
    assert results(model, combined)["kinds"] == expected


def test_only_the_first_replica_sends():
    model = make(Kinds("only_first_replica"))
    model.evaluate(*data(4), verbose=0)
    state = snapshot(model)
    index = next(i for i, v in enumerate(model.metrics_variables) if "value" in v.path)
    state.values[index] = np.array(3.0, np.float32)
    (combined,) = global_states(FakeCommunicator(1, reduce=lambda a: a), model, [state])
    assert combined.values[index] == 0.0


def test_aggregation_none_is_refused():
    model = make(Kinds("none", name="mine"))
    model.evaluate(*data(4), verbose=0)
    communicator = FakeCommunicator()
    with pytest.raises(ValueError, match=r"(?s)mine.*aggregation='none'.*'sum', 'mean'"):
        global_states(communicator, model, [snapshot(model)])
    assert communicator.calls == []


def test_several_states_in_one_collective():
    model = make("mae")
    model.evaluate(*data(10), verbose=0)
    one = MetricState(snapshot(model).values, {"b": 2.0, "a": 1.0})
    model.evaluate(*data(4), verbose=0)
    two = snapshot(model)
    communicator = FakeCommunicator(size=4)
    first, second = global_states(communicator, model, [one, two])
    assert communicator.calls == ["allreduce"]
    assert first.extras == {"a": 1.0, "b": 2.0}, "averaged: alike on all ranks here"
    assert second.extras == {}
    for mine, combined in [(one, first), (two, second)]:
        for value, total in zip(mine.values, combined.values, strict=True):
            np.testing.assert_allclose(total, value.astype(np.float64) * 4)


def test_sums_are_made_in_float64():
    """A float32 count stops counting at 2**24."""
    model = make()
    state = snapshot(model)
    big = [np.full(v.shape, 2.0**24, np.float32) for v in state.values]
    communicator = FakeCommunicator(reduce=lambda array: array + 1.0)
    (combined,) = global_states(communicator, model, [MetricState(big)])
    assert all(np.all(v == 2.0**24 + 1) for v in combined.values)


def test_a_world_of_one_changes_nothing():
    model = make("mae")
    expected = model.evaluate(*data(10), verbose=0, return_dict=True)
    (state,) = global_states(SingleCommunicator(), model, [snapshot(model)])
    assert results(model, state) == pytest.approx(expected, rel=1e-7)


def test_metrics_with_many_values_stay_arrays():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score(name="f1")])
    x, y = data(12)
    model.evaluate(x, np.concatenate([y, 1 - y], 1), verbose=0)
    value = results(model, snapshot(model))["f1"]
    assert isinstance(value, np.ndarray)
    assert value.shape == (2,)


def test_names_are_asked_for_once_until_the_model_is_compiled_anew(monkeypatch):
    model = make("mae")
    x, y = data(8)
    model.evaluate(x, y, verbose=0)
    asked = []
    own = model.get_metrics_result
    monkeypatch.setattr(model, "get_metrics_result", lambda: asked.append(1) or own())
    assert reported_names(model) == reported_names(model) == {"loss", "mae"}
    assert len(asked) == 1
    model.compile("sgd", "mse", metrics=["mse", "mape"])
    model.evaluate(x, y, verbose=0)
    assert reported_names(model) == {"loss", "mse", "mape"}
