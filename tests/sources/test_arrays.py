"""Arrays in memory, of pandas as Keras takes them, and on disk, of which a rank reads its rows."""

from __future__ import annotations

import itertools

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sources.base import in_order, runs
from tests.sources.parts import alike, batches, datasets, global_batches, put_together


@given(st.sets(st.integers(0, 60)))
def test_runs_cover_the_indices(indices):
    ascending = np.array(sorted(indices), "int64")
    found = runs(ascending)
    assert [i for begin, end in found for i in range(begin, end)] == ascending.tolist()
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(found))


@given(st.lists(st.integers(0, 60)))
def test_what_is_read_in_order_comes_as_it_was_asked_for(indices):
    asked = []

    def read(ascending):
        asked.extend(ascending.tolist())
        return ascending * 10

    assert in_order(read, np.array(indices, "int64")).tolist() == [10 * i for i in indices]
    assert asked == sorted(indices)


class OnDisk:
    """What `h5py.Dataset` and a zarr array have, and a note of the rows that are read."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.rows: list[int] = []

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.rows += range(rows.start, rows.stop)
        return self._array[rows]

    def __array__(self, *args, **kwargs):
        raise AssertionError("loaded whole")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_rank_reads_its_own_rows(size, shuffle):
    array = np.arange(120, dtype="float32").reshape(60, 2)
    disk, y = OnDisk(array), np.arange(60)
    ranks = datasets((disk, {"y": y}), size, batch_size=8, shuffle=shuffle)
    assert disk.rows == []
    everyone, seen = [], []
    for dataset in ranks:
        everyone.append(batches(dataset))
        assert len(disk.rows) == pytest.approx(60 / size, abs=4)
        assert len(set(disk.rows)) == len(disk.rows)
        seen += disk.rows
        disk.rows.clear()
    assert sorted(seen) == list(range(60))
    for x, labels in put_together(everyone):
        np.testing.assert_array_equal(x, array[labels["y"]])


def of_memmap(path, array):
    mapped = np.memmap(path, array.dtype, "w+", shape=array.shape)
    mapped[:] = array
    return mapped


def of_h5py(path, array):
    with h5py.File(path, "w") as file:
        file["x"] = array
    return h5py.File(path)["x"]


@pytest.mark.parametrize("make", [of_memmap, of_h5py])
def test_arrays_on_disk_have_the_values_of_those_in_memory(tmp_path, make):
    array = np.arange(90, dtype="int16").reshape(30, 3)
    data = (make(tmp_path / "x", array), np.arange(30))
    for options in ({}, {"shuffle": True, "seed": 4}):
        expected = global_batches((array, np.arange(30)), 1, batch_size=7, **options)
        alike(global_batches(data, 3, batch_size=7, **options), expected)


def seen_by_keras(x, y, batch_size):
    """The batches that `fit` itself would make."""
    seen = []

    class Model(keras.Model):
        def train_step(self, data):
            seen.append([t.numpy() for t in data])
            return {"loss": tf.constant(0.0)}

    model = Model()
    model.compile(run_eagerly=True)
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    return seen


def test_pandas_is_taken_as_keras_takes_it():
    frame = pd.DataFrame({"a": np.arange(5.0), "b": np.arange(5) * 2})
    series = pd.Series(np.arange(5), dtype="int64")
    expected = seen_by_keras(frame, series, 2)
    assert expected[0][0].shape == (2, 2)
    assert expected[0][1].shape == (2, 1)
    for (x, y), (keras_x, keras_y) in zip(
        global_batches((frame, series), 2, batch_size=2), expected, strict=True
    ):
        np.testing.assert_array_equal(x, keras_x)
        np.testing.assert_array_equal(y, keras_y)
        assert (x.dtype, y.dtype) == (keras_x.dtype, np.int64)


def test_a_dict_of_columns_an_index_and_strings():
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "name": ["x", "yy", "z"]}, index=[7, 8, 9])
    (batch,) = global_batches((dict(frame), frame.index), 2, batch_size=3)
    columns, index = batch
    assert columns["a"].tolist() == [[1], [2], [3]]
    assert columns["a"].dtype == np.float32
    assert columns["name"].tolist() == [[b"x"], [b"yy"], [b"z"]]
    assert index.tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match=r"dict\(frame\)"):
        datasets(frame, 1, batch_size=3)


def test_tensors_and_python_lists_of_arrays():
    data = [tf.range(4), np.arange(4.0)]
    (batch,) = global_batches(data, 2, batch_size=4)
    assert [leaf.tolist() for leaf in batch] == [[0, 1, 2, 3], [0, 1, 2, 3]]
