"""Metrics of a user's own: what adds up is summed, what says how is merged, the rest is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator import additive, metrics, watch
from tests.distributed import threads

ops = keras.ops


class Own(keras.metrics.Metric):
    """A state of two numbers that becomes `change(state, y_pred)`."""

    def __init__(self, change: Any, start: float = 0.0, **options: Any) -> None:
        super().__init__(name="own")
        self.change, self.start = change, start
        self.state = self.add_variable((2,), "zeros", name="state", **options)

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        self.state.assign(self.change(self.state, y_pred))

    def result(self):
        return self.state[0]

    def reset_state(self) -> None:
        self.state.assign(ops.full((2,), self.start))


def both(value):
    return ops.stack([value, -value])


CHANGES = {
    "maximum": lambda state, y: ops.maximum(state, ops.max(y)),
    "last": lambda state, y: both(ops.mean(y)),
    "decay": lambda state, y: 0.99 * state + 0.01 * both(ops.mean(y)),
    "running mean": lambda state, y: (state + both(ops.mean(y))) / 2,
    "product": lambda state, y: (1 + state) * both(ops.sum(y)) + state,
}
SUMS = {
    "sum": lambda state, y: state + both(ops.sum(y)),
    "squares": lambda state, y: state + both(ops.sum(y * y)),
    "large": lambda state, y: state + 1e7 * both(ops.sum(y)),
    "count": lambda state, y: state + ops.cast(ops.shape(y)[0], "float32"),
    "not a number": lambda state, y: state + both(ops.sum(y)) / 0.0,
}


class Peak(keras.metrics.Metric):
    """The largest prediction; says how ranks combine."""

    def __init__(self, name: str = "peak") -> None:
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", name="value")
        self.where = self.add_variable((2,), "zeros", dtype="int32", name="where")

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        self.value.assign(ops.maximum(self.value, ops.max(y_pred)))
        self.where.assign(self.where + 1)

    def result(self):
        return self.value

    def merge_state(self, states):
        assert all(value.dtype == np.float32 and where.dtype == np.int32 for value, where in states)
        return [np.max([s[0] for s in states]), np.stack([s[1] for s in states])[-1]]


def model_of(*own, **options) -> keras.Model:
    """y = x, with `watch.step` around its steps as on many ranks."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile("sgd", "mse", metrics=list(own), **options)
    return watched(model)


def watched(model: keras.Model) -> keras.Model:
    step = model.test_step

    def test_step(data):
        with watch.step(model, tf.shape(data[0])[0]):
            return step(data)

    model.test_step = test_step
    return model


def evaluate_on_ranks(make, parts, **options):
    """Every rank's results after an evaluation of its part, in batches of 4."""

    def rank_main(communicator):
        model = make()
        x = np.asarray(parts[communicator.rank], np.float32).reshape(-1, 1)
        model.evaluate(x, 2 * x, batch_size=4, verbose=0)
        state = metrics.snapshot(model)
        (state,) = metrics.global_states(communicator, model, [state])
        return metrics.results(model, state)

    return threads.run(len(parts), rank_main)


PARTS = [[0.5, 1.0, 2.0, 0.25, 3.0], [1.5, 2.5]]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_sum_that_does_not_add_up_is_refused(name, eager):
    def make():
        return model_of(Own(CHANGES[name]), run_eagerly=eager)

    with pytest.raises(ValueError, match=r"(?s)'own' of class Own.*'own/state'.*def merge_state"):
        evaluate_on_ranks(make, PARTS)


def test_the_refusal_says_what_was_seen():
    parts = [[0.0] * 5, [1.5, 2.5]]
    seen = r"on rank 1, one update changed it by 2\.5, .* made twice changed it by 2\.5, not 5\."
    with pytest.raises(ValueError, match=seen):
        evaluate_on_ranks(lambda: model_of(Own(CHANGES["maximum"])), parts)


def test_all_ranks_raise_alike():
    def rank_main(communicator):
        model = model_of(Own(CHANGES["maximum"]))
        x = np.full((4, 1), communicator.rank, np.float32)
        model.evaluate(x, x, verbose=0)
        with pytest.raises(ValueError, match="does not add up: on rank 1") as error:
            metrics.global_states(communicator, model, [metrics.snapshot(model)])
        return str(error.value)

    texts = threads.run(3, rank_main)
    assert texts == [texts[0]] * 3


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_that_adds_up_is_summed(name, eager):
    ours, same = evaluate_on_ranks(lambda: model_of(Own(SUMS[name]), run_eagerly=eager), PARTS)
    whole = np.concatenate([np.asarray(part, np.float32) for part in PARTS]).reshape(-1, 1)
    alone = model_of(Own(SUMS[name])).evaluate(whole, 2 * whole, verbose=0, return_dict=True)
    assert ours == pytest.approx(alone, rel=1e-6, nan_ok=True)
    assert same == pytest.approx(ours, rel=0, nan_ok=True)


def test_the_check_ends_once_all_variables_have_changed():
    calls = []

    def change(state, y):
        if isinstance(y, tf.Tensor) and tf.executing_eagerly():
            calls.append(1)
        return state + both(ops.sum(y))

    model = model_of(Own(change), run_eagerly=True)
    for values, times in [([0.0] * 4, 3), ([1.0] * 4, 3), ([2.0] * 4, 1), ([0.0] * 4, 1)]:
        x = np.asarray(values, np.float32).reshape(-1, 1)
        calls.clear()
        model.test_on_batch(x, x)
        assert len(calls) == times, "until a change is seen, each update is made twice more"


def test_what_starts_elsewhere_than_at_zero_is_refused():
    def make():
        return model_of(Own(SUMS["sum"], start=1.5))

    with pytest.raises(ValueError, match=r"after reset_state\(\) it is 1\.5, not 0"):
        evaluate_on_ranks(make, PARTS)


def test_a_declared_mean_is_believed():
    def make():
        return model_of(Own(CHANGES["last"], start=1.0, aggregation="mean"))

    ours, _ = evaluate_on_ranks(make, [[1.0], [4.0]])
    assert ours["own"] == 2.5


def test_what_no_update_put_there_is_refused():
    class Direct(keras.Sequential):
        def test_step(self, data):
            logs = super().test_step(data)
            own = next(m for m in self._compile_metrics.metrics if m.name == "own")
            own.state.assign_add([1.0, 1.0])
            return logs

    def make():
        model = Direct([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", metrics=[Own(lambda state, y: state + 0.0)])
        step = model.test_step

        def watched(data):
            with watch.step(model, 1):
                return step(data)

        model.test_step = watched
        return model

    with pytest.raises(ValueError, match="it holds 1, which no update_state"):
        evaluate_on_ranks(make, [[1.0], [1.0]])


def test_merge_state_is_given_every_rank_s_state():
    counts = []

    def rank_main(communicator):
        model = model_of(Peak(), "mae")
        x = np.full((4, 1), 3.0 - communicator.rank, np.float32)
        model.evaluate(x, x, batch_size=4 if communicator.rank else 2, verbose=0)
        own = communicator.allreduce
        communicator.allreduce = lambda array: counts.append(1) or own(array)
        states = [metrics.snapshot(model)] * 2
        first, second = metrics.global_states(communicator, model, states)
        return second, metrics.results(model, first)

    for state, results in threads.run(3, rank_main):
        assert results["peak"] == 3.0
        np.testing.assert_array_equal(state.values[2], 3.0)
        np.testing.assert_array_equal(state.values[3], [1, 1])
    assert len(counts) == 3, "one on each rank, whatever is in it"


@pytest.mark.parametrize("result", [[], [1.0], [np.zeros(2), np.zeros(2)]])
def test_merge_state_must_return_a_state(result, monkeypatch):
    monkeypatch.setattr(Peak, "merge_state", lambda self, states: result)
    with pytest.raises(ValueError, match=r"'peak' returned arrays of shapes .* \[\(\), \(2,\)\]"):
        evaluate_on_ranks(lambda: model_of(Peak()), PARTS)


class Outside(keras.metrics.Metric):
    def __init__(self, kept: Any) -> None:
        super().__init__(name="outside")
        self.kept = kept

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        pass

    def result(self):
        return 0.0


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0.0, "keeps its state in no variable"),
        (tf.Variable(tf.constant(0.0)), r"keeps its state in tf.Variables \(kept\)"),
        (keras.Variable(0.0, name="plain"), "aggregation='none'"),
    ],
)
def test_state_outside_metric_variables_is_refused(kept, message):
    with pytest.raises(ValueError, match=rf"(?s)'outside'.*{message}.*merge_state"):
        evaluate_on_ranks(lambda: model_of(Outside(kept)), PARTS)


def test_a_model_is_saved_cloned_and_pickled_as_before(tmp_path):
    model = model_of("mae", keras.metrics.AUC(name="auc"), Own(SUMS["sum"]))
    x = np.ones((4, 1), np.float32)
    model.evaluate(x, x, verbose=0)
    for metric in additive.leaves(model):
        assert not {"update_state"} & set(vars(metric)), "only while a step runs"
    model.compile("sgd", "mse", metrics=["mae"])
    expected = model.evaluate(x, 2 * x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(x, 2 * x, verbose=0) == expected
    keras.models.clone_model(model)


def test_metrics_given_to_compile_are_known_before_the_first_step():
    given = [keras.metrics.AUC(name="auc"), "mae"]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=given, weighted_metrics=[keras.metrics.Recall()])
    assert len(model.metrics_variables) == 2, "the loss's"
    assert len(additive.state_variables(model)) == 2 + 4 + 2
    x = np.ones((4, 1), np.float32)
    model.evaluate(x, x, verbose=0)
    known = additive.state_variables(model)
    assert [id(v) for v in known] == [id(v) for v in model.metrics_variables]
    assert len(known) == 2 + 4 + 2 + 2


def scalar_error(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred))


def test_means_of_batches_count_by_their_samples():
    """What is told one number a batch: a function of the user's, the loss of one output."""

    def make():
        x = keras.Input((1,))
        outputs = [keras.layers.Dense(1, name=n, kernel_initializer="ones")(x) for n in "ab"]
        model = keras.Model(x, outputs)
        model.compile("sgd", ["mse", "mae"], metrics=[[scalar_error], []])
        return watched(model)

    def rank_main(communicator):
        model = make()
        x = np.arange(10, dtype=np.float32).reshape(-1, 1)
        x = x[:7] if communicator.rank == 0 else x[7:]
        model.evaluate(x, [2 * x, 3 * x], batch_size=7, verbose=0)
        (state,) = metrics.global_states(communicator, model, [metrics.snapshot(model)])
        return metrics.results(model, state)

    ours, _ = threads.run(2, rank_main)
    assert ours == pytest.approx({"a_loss": 28.5, "b_loss": 9, "a_scalar_error": 4.5, "loss": 37.5})


def test_the_page_s_example(monkeypatch):
    """docs/custom-metrics.md, as written."""
    page = (Path(__file__).parents[1] / "docs" / "custom-metrics.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "custom-metrics.md", "exec"), names)
    parts = [[1.0, 7.0, 2.0], [3.0]]
    wrong, right = names["LargestError"], names["MergedLargestError"]
    with pytest.raises(ValueError, match="LargestError"):
        evaluate_on_ranks(lambda: model_of(wrong(name="error")), parts)
    ours, _ = evaluate_on_ranks(lambda: model_of(right(name="error")), parts)
    assert ours["error"] == 7.0
    summed, _ = evaluate_on_ranks(lambda: model_of(names["Bias"](name="bias")), parts)
    assert summed["bias"] == pytest.approx(-13 / 4)
