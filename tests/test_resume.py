"""The parts of a training's state: files, generators, settings, records, metrics of other ranks."""

from __future__ import annotations

import json
import random

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from orchestrator import callbacks, metrics
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError
from orchestrator.events import RunDirectory
from orchestrator.resume import files, randomness, training
from orchestrator.resume.settings import compare
from tests.callbacks.models import fit, make

TREE = {
    "number": 3,
    "float": 0.1,
    "nan": float("nan"),
    "none": None,
    "yes": True,
    "list": [1, "two", [3.0]],
    "nested": {"array": np.arange(6, dtype=np.int16).reshape(2, 3), "a/b": np.zeros((0, 2))},
    "scalars": [np.float32(0.1), np.int64(2**60), np.array(7, np.uint8)],
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    "flags": np.array([True, False]),
}


def test_a_state_is_what_it_was(tmp_path):
    packed = files.pack(TREE)
    packed.write_json(str(tmp_path / files.JSON))
    packed.write_arrays(str(tmp_path / files.ARRAYS))
    again = files.unpack(files.read(str(tmp_path)))
    assert set(again) == set(TREE)
    assert np.isnan(again.pop("nan"))
    for name, value in again.items():
        flat, expected = keras.tree.flatten(value), keras.tree.flatten(TREE[name])
        for one, two in zip(flat, expected, strict=True):
            assert getattr(one, "dtype", type(one)) == getattr(two, "dtype", type(two))
            np.testing.assert_array_equal(one, two)
    assert json.loads((tmp_path / files.JSON).read_text())["list"] == [1, "two", [3.0]]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"callbacks": [{"state": {"model": object()}}]}, "callbacks/0/state/model: object cannot"),
        ({"a": {1: 2}}, "keys must be strings"),
    ],
)
def test_what_cannot_be_saved_is_named(tree, message):
    with pytest.raises(TypeError, match=message):
        files.pack(tree)


def drawn() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),
        float(np.random.normal()),
        float(tf.random.uniform([])),
        float(tf.random.get_global_generator().uniform([])),
        float(keras.random.uniform([])),
    ]


def test_generators_go_on(tmp_path):
    keras.utils.set_random_seed(5)
    drawn()
    packed = files.pack(randomness.state())
    expected = drawn()
    assert drawn() != expected
    keras.utils.set_random_seed(5)  # as the process that goes on does
    randomness.restore(files.unpack(packed))
    assert drawn() == expected


BEFORE = {
    "run": {"dir": "a", "seed": 3, "resume": "auto"},
    "train": {"epochs": 3, "global_batch_size": 8},
    "model": {"factory": "m:f", "options": {}},
    "callbacks": [{"EarlyStopping": {"patience": 3}}],
}


def changed(section, **values):
    return {**BEFORE, section: {**BEFORE[section], **values}}


def test_settings_that_may_change():
    assert compare(BEFORE, changed("run", dir="b", resume="never")) == []
    assert compare(BEFORE, changed("train", epochs=5)) == ["train.epochs: 3 before, 5 now"]
    assert compare(BEFORE, changed("run", seed=None)) == ["run.seed: 3 before, None now"]
    (words,) = compare(BEFORE, {**BEFORE, "callbacks": []})
    assert words == "callbacks: [{'EarlyStopping': {'patience': 3}}] before, [] now"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (changed("train", global_batch_size=4), "train.global_batch_size: 8 before, 4 now"),
        (changed("run", seed=4), "run.seed: 3 before, 4 now"),
        (changed("model", options={"width": 2}), "model.options.width: None before, 2 now"),
        (changed("model", factory="m:g"), "model.factory: 'm:f' before, 'm:g' now"),
    ],
)
def test_settings_that_may_not(now, words):
    with pytest.raises(SettingError) as caught:
        compare(BEFORE, now)
    assert words in str(caught.value)


def kinds(url):
    lines = (url / "events.jsonl").read_text().splitlines()
    return [(json.loads(line)["kind"], json.loads(line)["step"]) for line in lines]


def test_the_record_goes_back_to_where_a_checkpoint_was(tmp_path):
    first = RunDirectory(str(tmp_path))
    happened = [("start", 0), ("best", 3), ("checkpoint", 3), ("best", 6), ("preempt", 7)]
    for kind, step in happened:
        state = {"state": True} if kind == "checkpoint" else {}
        first.emit(kind, epoch=None, step=step, rank=0, **state)
    assert first.decisions == 2
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 12, "ki')  # where a writer died
    second = RunDirectory(str(tmp_path), keep=True)
    second.emit("start", epoch=None, step=0, rank=0)
    second.rewind(1, 5)
    assert kinds(tmp_path)[:4] == [("start", 0), ("best", 3), ("checkpoint", 3), ("preempt", 7)]
    second.emit("best", epoch=1, step=6, rank=0)
    assert second.decisions == 2
    second.rewind(0, 0)
    assert {kind for kind, _ in kinds(tmp_path)} == {"start", "preempt"}
    RunDirectory(str(tmp_path))
    assert kinds(tmp_path) == []


class Largest(keras.metrics.Metric):
    """A metric that says itself how ranks combine."""

    def __init__(self):
        super().__init__(name="largest")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

    def result(self):
        return self.value

    def merge_state(self, states):
        return [np.maximum.reduce(arrays) for arrays in zip(*states, strict=True)]


def test_metrics_of_other_ranks_are_shared_out():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae", Largest()])
    model.test_on_batch(np.ones((2, 1)), np.ones((2, 1)))
    rng = np.random.default_rng(0)
    held = [[rng.random(v.shape).astype(v.dtype) for v in model.metrics_variables] for _ in "abc"]
    shares = [metrics.share(model, held, rank) for rank in range(2)]
    largest = [v.path.endswith("largest/value") for v in model.metrics_variables].index(True)
    for index, values in enumerate(zip(*held, strict=True)):
        combined = np.max(values, 0) if index == largest else np.sum(values, 0)
        np.testing.assert_allclose(shares[0][index], combined, rtol=1e-6)
        assert not shares[1][index].any()


def test_a_state_of_a_newer_version_is_refused_and_left(tmp_path, monkeypatch):
    def saver():
        return callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False)

    with monkeypatch.context() as newer:
        newer.setattr(training, "FORMAT", training.FORMAT + 1)
        fit(make(), saver(), epochs=2)
    model = make()
    before = model.get_weights()
    with pytest.raises(SettingError, match=r"has format 2; .* reads formats up to 1\. Continue it"):
        fit(model, saver(), epochs=3)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [one.step for one in CheckpointStore(str(tmp_path)).list()] == [6]
