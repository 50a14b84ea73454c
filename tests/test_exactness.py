"""Global metrics are those of one process: every metric of Keras, any parts, any counts."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from orchestrator import metrics
from tests import metric_cases
from tests.distributed import threads
from tests.metric_cases import CASES, PARTS, AllMetrics, alone, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Falling back to standard R2 score:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
NAMES = [case.name for case in CASES]
WORLDS = [(shape, size) for shape, sizes in PARTS.items() for size in sizes]


@pytest.fixture(scope="module")
def model():
    return AllMetrics()


@pytest.fixture(scope="module")
def combined(model):
    """Results of all metrics, by shape of the parts and number of ranks, and the collectives."""

    @functools.cache
    def state(begin: int, end: int) -> metrics.MetricState:
        model.update(begin, end)
        return metrics.snapshot(model)

    def rank_main(states, communicator):
        calls, own = [], communicator.allreduce
        communicator.allreduce = lambda array: calls.append(array.size) or own(array)
        return metrics.global_states(communicator, model, [states[communicator.rank]])[0], calls

    result, collectives = {}, []
    for shape, size in WORLDS:
        ends = np.cumsum([0, *PARTS[shape][size]]).tolist()
        states = [state(*pair) for pair in itertools.pairwise(ends)]
        ranks = threads.run(size, functools.partial(rank_main, states))
        collectives += [calls for _, calls in ranks]
        result[shape, size] = metrics.results(model, ranks[-1][0])
    return result, collectives


def test_every_class_of_keras_has_a_case():
    public = {
        name
        for name, kind in vars(keras.metrics).items()
        if isinstance(kind, type) and issubclass(kind, keras.metrics.Metric)
    }
    assert public == {case.kind for case in CASES} | metric_cases.ABSTRACT
    assert len(NAMES) == len(set(NAMES)) > 150
    assert sum(case.weighted for case in CASES) > 70


def test_every_metric_of_keras_sums(model):
    assert len(model.metrics_variables) > 400
    assert {v.aggregation for v in model.metrics_variables} == {"sum"}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_metric_equals_one_process(combined, case):
    for (shape, size), results in combined[0].items():
        whole = alone(case, sum(PARTS[shape][size]))
        error = relative_error(results[case.name], whole)
        assert error <= 1e-6, (shape, size, results[case.name], whole)


def test_one_collective_for_all_metrics(combined):
    assert len(combined[1]) == sum(size for _, size in WORLDS)
    assert {len(calls) for calls in combined[1]} == {1}
    assert all(calls[0] > 10_000 for calls in combined[1])


def test_the_cases_tell_an_average_from_the_whole(combined):
    """Ranks' results averaged, as Horovod does, are wrong by more than a percent nearly always."""
    wrong = 0
    for case in CASES:
        metric = case.make()
        each = []
        for begin, end in [(0, 100), (100, 110), (110, 111)]:
            metric.reset_state()
            case.update(metric, begin, end)
            each.append(keras.ops.convert_to_numpy(metric.result()))
        wrong += not relative_error(np.mean(each, 0), alone(case, 111)) < 0.01
    assert wrong > 0.95 * len(CASES)


def test_results_of_counts_beyond_their_dtype(model):
    """Every metric of Keras takes counts that float32 and int32 cannot hold."""
    times = 2**33 + 1
    model.update(0, 111)
    state = metrics.snapshot(model)
    large = metrics.MetricState([v.astype(np.float64) * times for v in state.values])
    few, many = metrics.results(model, state), metrics.results(model, large)
    for case in CASES:
        grows = case.kind in ("Sum", *(f"{a}{b}" for a in ("True", "False") for b in _SIGNS))
        if case.options.get("num_regressors"):
            continue  # corrects by the number of samples
        expected = np.asarray(few[case.name], np.float64) * (times if grows else 1)
        assert relative_error(many[case.name], expected) < 2e-6, case.name


_SIGNS = ("Positives", "Negatives")
RANK_ROWS = [10_000_001, 9_999_999, 10_000_003, 10_000_000]
BATCH = 2_000_000


class Large(keras.Model):
    """What counts forty million samples; eager."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = keras.metrics.Mean(name="mean")
        self.sum = keras.metrics.Sum(name="sum")
        self.auc = keras.metrics.AUC(name="auc")
        self.positives = keras.metrics.TruePositives(thresholds=0.0, name="positives")


@pytest.fixture(scope="module")
def large():
    """The model, its state on each of four ranks, and the true number of positives."""
    model, states = Large(), []
    rng = np.random.default_rng(0)
    scores = rng.random(BATCH, np.float32)
    labels = (rng.random(BATCH, np.float32) < scores).astype("float32")
    labels[[0, 1, 2, -1]] = [1, 1, 0, 0]  # so that the number of positives is odd, too
    positives = 0
    for rows in RANK_ROWS:
        model.reset_metrics()
        for begin in range(0, rows, BATCH):
            y, p = labels[: rows - begin], scores[: rows - begin]
            model.mean.update_state(y)
            model.sum.update_state(y)
            model.auc.update_state(y, p)
            model.positives.update_state(y, p)
            positives += int(y.sum(dtype=np.float64))
        states.append(metrics.snapshot(model))
    return model, states, positives


def test_counts_above_2_to_the_24_lose_no_sample(large):
    model, states, positives = large
    samples = sum(RANK_ROWS)
    assert samples == 40_000_003 > 2**24
    assert positives % 2 == 1

    def rank_main(communicator):
        return metrics.global_states(communicator, model, [states[communicator.rank]])[0]

    for state in threads.run(4, rank_main):
        by_path = dict(zip([v.path for v in model.metrics_variables], state.values, strict=True))
        assert by_path["mean/count"] == samples
        assert by_path["mean/total"] == positives
        true, false = by_path["auc/true_positives"], by_path["auc/false_positives"]
        assert np.all(true + by_path["auc/false_negatives"] == positives)
        assert np.all(false + by_path["auc/true_negatives"] == samples - positives)
        results = metrics.results(model, state)
        assert results["positives"] == results["sum"] == positives
        assert relative_error(results["mean"], positives / samples) < 1.2e-7
        area = np.trapezoid(true[::-1] / true[0], false[::-1] / false[0])
        assert relative_error(results["auc"], area) < 2e-7


def test_a_sum_in_float32_loses_samples(large):
    model, states, positives = large
    paths = [v.path for v in model.metrics_variables]
    sums: dict[str, Any] = {
        path: functools.reduce(np.add, [state.values[i] for state in states])
        for i, path in enumerate(paths)
    }
    assert all(value.dtype == np.float32 for value in sums.values())
    assert int(sums["mean/count"]) != sum(RANK_ROWS)
    total = sums["auc/true_positives"].astype(np.float64) + sums["auc/false_negatives"]
    lost = np.abs(total - positives)
    assert lost.max() >= 1
    count = int(sums["mean/count"]) - sum(RANK_ROWS)
    print(f"float32: count off by {count}, AUC's positives by up to {lost.max():g}, at")
    print(f"{np.count_nonzero(lost)} of {lost.size} thresholds")


def test_the_page_lists_every_case():
    page = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text("utf-8")
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")] == NAMES
    assert "python benchmarks/metric_errors.py --write docs/exactness.md" in page
