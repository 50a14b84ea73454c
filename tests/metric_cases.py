"""Every metric of `keras.metrics`, with the options that change its state, and data for each.

One table for the fast tests, the tests on real ranks and `benchmarks/metric_errors.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

ROWS = 120
# Samples on each rank, by the shape of the parts and the number of ranks.
PARTS = {
    "even": {size: [ROWS // size] * size for size in (1, 2, 3, 4)},
    "uneven": {1: [111], 2: [100, 11], 3: [100, 10, 1], 4: [100, 10, 1, 0]},
    "empty": {1: [0], 2: [0, 60], 3: [60, 0, 60], 4: [0, 0, 111, 0]},
}
# Bases, whose own results are not defined.
ABSTRACT = {"Metric"}


def _softmax(x: np.ndarray) -> np.ndarray:
    exponential = np.exp(x - x.max(-1, keepdims=True))
    return (exponential / exponential.sum(-1, keepdims=True)).astype("float32")


def _data() -> dict[str, tuple[np.ndarray, ...]]:
    """What `update_state` is given before the weights, by kind; `ROWS` rows each."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, ROWS).astype("int32")
    # The last rows are unlike the first, as where data are sorted: averages of ranks then differ.
    drift = np.linspace(-1.0, 1.0, ROWS, dtype="float32")[:, None]
    binary = rng.integers(0, 2, (ROWS, 1)).astype("float32")
    many = rng.integers(0, 2, (ROWS, 4)).astype("float32")
    one_hot = np.eye(5, dtype="float32")[labels]
    logits = rng.normal(size=(ROWS, 5)) + 1.5 * one_hot * (drift > -0.5)
    scores = (0.8 * binary + drift + rng.normal(size=(ROWS, 1))).astype("float32")
    many_scores = (0.8 * many + drift + rng.normal(size=(ROWS, 4))).astype("float32")
    targets = rng.uniform(0.5, 2.5, (ROWS, 3)).astype("float32") + drift.clip(0)
    guesses = (targets + rng.uniform(0.05, 0.6, (ROWS, 3))).astype("float32")
    guessed = np.where(rng.random(ROWS) < 0.6, labels, rng.integers(0, 5, ROWS)).astype("int32")
    pixels = rng.integers(0, 3, (ROWS, 4, 4)).astype("int32")
    guessed_pixels = np.where(rng.random(pixels.shape) < 0.7, pixels, 1).astype("int32")
    return {
        "values": (targets,),
        "numbers": (targets[:, 0],),
        "binary": (binary, 1 / (1 + np.exp(-scores))),
        "binary logits": (binary, scores),
        "labels x4": (many, 1 / (1 + np.exp(-many_scores))),
        "labels x4 logits": (many, many_scores),
        "classes": (one_hot, _softmax(logits)),
        "classes logits": (one_hot, logits.astype("float32")),
        "sparse": (labels, _softmax(logits)),
        "sparse logits": (labels, logits.astype("float32")),
        "ranking": (labels, np.argsort(-logits, -1).astype("int32")),
        "equal": (labels, guessed),
        "mask": (binary[:, 0], 1 / (1 + np.exp(-scores[:, 0]))),
        "pixels": (pixels, guessed_pixels),
        "regression": (targets, guesses),
        # R2Score subtracts sums of squares, which multiplies rounding where targets are far from 0.
        "centred": (targets - targets.mean(0), guesses - targets.mean(0)),
        "signs": (2 * many - 1, many_scores),
        "distributions": (_softmax(logits + rng.normal(size=(ROWS, 5))), _softmax(logits)),
    }


DATA = _data()
_WEIGHTS = np.random.default_rng(4).uniform(0.2, 2.0, ROWS).astype("float32")


@dataclass(frozen=True, eq=False)
class Case:
    """A metric and its data.

    Attributes:
        kind: The class's name in `keras.metrics`.
        data: A key of `DATA`.
        weighted: Whether samples have weights.
        options: Of the class's constructor.
    """

    kind: str
    data: str
    weighted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the reader would write it."""
        shown = ", ".join(
            f"{key}={getattr(value, '__name__', None) or repr(value)}"
            for key, value in self.options.items()
        )
        extra = self.data.removeprefix("binary").removeprefix("classes").strip()
        words = [f"{self.kind}({shown})", *([f"of {extra}"] if extra else [])]
        return " ".join([*words, *(["weighted"] if self.weighted else [])])

    def make(self) -> keras.Metric:
        """A new metric, named as the case."""
        return getattr(keras.metrics, self.kind)(**self.options, name=self.name)

    def update(self, metric: keras.Metric, begin: int, end: int) -> None:
        """Updates it with some of the rows."""
        arguments = [array[begin:end] for array in DATA[self.data]]
        if self.weighted:
            arguments.append(_WEIGHTS[begin:end])
        metric.update_state(*arguments)


def _both(kind: str, data: str, **options: Any) -> list[Case]:
    """Without weights and with."""
    return [Case(kind, data, weighted, options) for weighted in (False, True)]


def _cases() -> list[Case]:
    cases = [
        *_both("Mean", "values"),
        *_both("Mean", "numbers"),
        *_both("Sum", "values"),
        *_both("MeanMetricWrapper", "regression", fn=keras.losses.huber),
        *_both("Accuracy", "equal"),
        *_both("BinaryAccuracy", "binary"),
        Case("BinaryAccuracy", "labels x4", options={"threshold": 0.3}),
        *_both("CategoricalAccuracy", "classes"),
        *_both("SparseCategoricalAccuracy", "sparse"),
        *_both("TopKCategoricalAccuracy", "classes", k=2),
        *_both("SparseTopKCategoricalAccuracy", "sparse", k=2),
        Case("SparseTopKCategoricalAccuracy", "ranking", options={"k": 2, "from_sorted_ids": True}),
    ]
    return cases + _regression() + _probabilities() + _confusion() + _areas() + _scores() + _iou()


def _regression() -> list[Case]:
    kinds = (
        "MeanSquaredError",
        "RootMeanSquaredError",
        "MeanAbsoluteError",
        "MeanAbsolutePercentageError",
        "MeanSquaredLogarithmicError",
        "CosineSimilarity",
        "LogCoshError",
        "PearsonCorrelation",
        "ConcordanceCorrelation",
    )
    cases = [case for kind in kinds for case in _both(kind, "regression")]
    for kind in ("Hinge", "SquaredHinge"):
        cases += _both(kind, "signs")
    for mode in ("uniform_average", "variance_weighted_average", None):
        cases += _both("R2Score", "centred", class_aggregation=mode)
    return [*cases, Case("R2Score", "centred", options={"num_regressors": 2})]


def _probabilities() -> list[Case]:
    return [
        *_both("BinaryCrossentropy", "binary"),
        *_both("BinaryCrossentropy", "labels x4 logits", from_logits=True, label_smoothing=0.1),
        *_both("CategoricalCrossentropy", "classes"),
        Case("CategoricalCrossentropy", "classes logits", options={"from_logits": True}),
        *_both("SparseCategoricalCrossentropy", "sparse"),
        Case("SparseCategoricalCrossentropy", "sparse logits", options={"from_logits": True}),
        Case("SparseCategoricalCrossentropy", "sparse", options={"ignore_class": 2}),
        *_both("KLDivergence", "distributions"),
        *_both("Poisson", "regression"),
        *_both("CategoricalHinge", "classes"),
    ]


_THRESHOLDS = [0.2, 0.5, 0.8]


def _confusion() -> list[Case]:
    cases = []
    for kind in ("TruePositives", "TrueNegatives", "FalsePositives", "FalseNegatives"):
        cases += [*_both(kind, "binary"), *_both(kind, "labels x4", thresholds=_THRESHOLDS)]
    for kind in ("Precision", "Recall"):
        cases += [
            *_both(kind, "binary"),
            *_both(kind, "labels x4", thresholds=_THRESHOLDS),
            *_both(kind, "classes", top_k=2),
            Case(kind, "classes", options={"class_id": 1}),
        ]
    for kind, option in (
        ("SensitivityAtSpecificity", "specificity"),
        ("SpecificityAtSensitivity", "sensitivity"),
        ("PrecisionAtRecall", "recall"),
        ("RecallAtPrecision", "precision"),
    ):
        cases += _both(kind, "binary", **{option: 0.6})
        cases.append(Case(kind, "labels x4", True, {option: 0.6, "num_thresholds": 50}))
        cases.append(Case(kind, "classes", False, {option: 0.6, "class_id": 3}))
    return cases


def _areas() -> list[Case]:
    cases = []
    for curve in ("ROC", "PR", "PRGAIN"):
        for method in ("interpolation", "minoring", "majoring"):
            cases += _both("AUC", "binary", curve=curve, summation_method=method)
    weights = [1.0, 2.0, 3.0, 4.0]
    return [
        *cases,
        *_both("AUC", "binary", thresholds=_THRESHOLDS),
        *_both("AUC", "binary logits", from_logits=True, num_thresholds=50),
        *_both("AUC", "labels x4"),
        *_both("AUC", "labels x4", multi_label=True),
        *_both("AUC", "labels x4", multi_label=True, num_labels=4, label_weights=weights),
        *_both("AUC", "labels x4", multi_label=True, curve="PR"),
    ]


def _scores() -> list[Case]:
    cases = []
    for average in (None, "micro", "macro", "weighted"):
        cases += _both("F1Score", "classes", average=average)
        cases += _both("FBetaScore", "labels x4", average=average, beta=2.0, threshold=0.4)
    return cases


def _iou() -> list[Case]:
    cases = []
    for weighted in (False, True):
        # Their state is whole numbers by default, which would cut weights off.
        kind: dict[str, Any] = {"dtype": "float32"} if weighted else {}
        some = {"num_classes": 5, "target_class_ids": [0, 2], **kind}
        cases += [
            Case("MeanIoU", "equal", weighted, {"num_classes": 5, **kind}),
            Case("MeanIoU", "equal", weighted, {"num_classes": 5, "ignore_class": 1, **kind}),
            Case("IoU", "equal", weighted, some),
            Case(
                "BinaryIoU", "mask", weighted, {"target_class_ids": [1], "threshold": 0.4, **kind}
            ),
            Case("OneHotIoU", "classes", weighted, some),
            Case("OneHotMeanIoU", "classes", weighted, {"num_classes": 5, **kind}),
        ]
    return [*cases, Case("MeanIoU", "pixels", options={"num_classes": 3})]


CASES = _cases()


class AllMetrics(keras.Model):
    """A model that has the metrics of all cases and nothing else; eager."""

    def __init__(self, cases: Sequence[Case] = ()) -> None:
        super().__init__()
        self.cases = list(cases or CASES)
        self.members = [case.make() for case in self.cases]
        # Some create their state when they first see data.
        self.update(0, 1)
        self.update(0, 0)

    def update(self, begin: int, end: int) -> None:
        """Makes their states those of these rows alone; of nothing where there are none."""
        for case, metric in zip(self.cases, self.members, strict=True):
            metric.reset_state()
            if end > begin:
                case.update(metric, begin, end)


@functools.cache
def alone(case: Case, rows: int) -> np.ndarray:
    """What Keras gives for the first rows in one process."""
    metric = case.make()
    case.update(metric, 0, max(rows, 1))
    if rows == 0:
        metric.reset_state()
    return keras.ops.convert_to_numpy(metric.result())


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest relative difference; absolute where the true value is 0."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = np.where(theirs == 0, 1.0, np.abs(theirs))
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(ours - theirs) / scale)))
