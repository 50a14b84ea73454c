"""`keras.utils.PyDataset` and generators: every rank takes all batches and keeps its part."""

from __future__ import annotations

import itertools
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.sources.parts import alike, batches, datasets, global_batches, put_together


def batch(number, length=4):
    x = np.arange(number * 4, number * 4 + length)
    return {"a": x.astype("float32")}, x


class Numbers(keras.utils.PyDataset):
    """Batches of 4, 4, 4, 4 and 2, and a note of what was called."""

    def __init__(self, length: int | None = 5, **options):
        super().__init__(**options)
        self.length = length
        self.calls = []

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, index):
        self.calls.append(index)
        return batch(index, 2 if index == 4 else 4)

    def on_epoch_begin(self):
        self.calls.append("begin")

    def on_epoch_end(self):
        self.calls.append("end")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [1, 3])
def test_a_py_dataset_gives_its_batches_in_order(size, workers):
    expected = [batch(i, 2 if i == 4 else 4) for i in range(5)]
    alike(global_batches(lambda: Numbers(workers=workers), size), expected)


def test_a_pass_begins_and_ends():
    data = Numbers()
    (dataset,) = datasets(data, 1)
    data.calls.clear()  # two batches are looked at for their shapes
    for _ in range(2):
        assert len(batches(dataset)) == 5
    one = ["begin", 0, 1, 2, 3, 4, "end"]
    assert data.calls == one * 2


def test_keras_sees_how_many_batches_there_are():
    (dataset,) = datasets(Numbers(), 1)
    assert int(dataset.cardinality()) == 5


def test_batches_of_a_py_dataset_are_shuffled_alike():
    orders = []
    for size in (1, 3):
        ranks = datasets(Numbers, size, shuffle=True, seed=2)
        for _ in range(2):
            epoch = put_together([batches(each) for each in ranks])
            orders.append([int(y[0]) // 4 for _, y in epoch])
    assert orders[:2] == orders[2:]
    assert sorted(orders[0]) == sorted(orders[1]) == [0, 1, 2, 3, 4]
    assert orders[0] != orders[1]


class Together(Numbers):
    """After the first look, a batch is given only where two are asked for at the same time."""

    both: threading.Barrier | None = None

    def __getitem__(self, index):
        if self.both is not None:
            self.both.wait()
        return super().__getitem__(index)


def test_workers_fetch_at_the_same_time():
    data = Together(length=4, workers=2)
    (dataset,) = datasets(data, 1)
    data.both = threading.Barrier(2, timeout=20)
    assert [int(y[0]) // 4 for _, y in batches(dataset)] == [0, 1, 2, 3]


def test_an_endless_py_dataset():
    (dataset,) = datasets(lambda: Numbers(length=None), 1, steps=3)
    assert [int(y[0]) for _, y in batches(dataset)] == [0, 4, 8]
    (dataset,) = datasets(lambda: Numbers(length=None), 1)
    assert [int(y[0]) for _, y in itertools.islice(dataset, 4)] == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda: Numbers(length=None), {"shuffle": True}, "where their number is known"),
        (lambda: Numbers(length=0), {}, "num_batches=0"),
        (Numbers, {"batch_size": 4}, "for arrays and files only"),
        (Numbers, {"validation_split": 0.5}, "for arrays and files only"),
        (Numbers, {"steps": 6}, "the data has 5 batches"),
        (lambda: iter([]), {}, "gives no batch"),
        (lambda: iter([batch(0)]), {"shuffle": True}, "can't shuffle a generator"),
        (lambda: iter([batch(0)]), {"batch_size": 4}, "for arrays and files only"),
        (lambda: iter([3, 4]), {}, "begin with the axis of samples"),
    ],
)
def test_what_is_out_of_place(data, options, message):
    with pytest.raises(ValueError, match=message):
        datasets(data, 2, **options)


def generator(count):
    for number in range(count):
        yield batch(number)


def test_a_generator_is_cut():
    alike(global_batches(lambda: generator(4), 3), [batch(i) for i in range(4)])


def test_a_generator_goes_on_where_a_pass_stopped():
    """Nothing is read ahead, so that a second `fit` misses no batch on any rank."""
    (dataset,) = datasets(lambda: generator(5), 1)
    first = [int(y[0]) // 4 for _, y in itertools.islice(dataset, 2)]
    rest = [int(y[0]) // 4 for _, y in dataset]
    assert first + rest == [0, 1, 2, 3, 4]
    with pytest.raises(tf.errors.OpError, match=r"used up.*[\s\S]*steps_per_epoch"):
        batches(dataset)


def test_with_steps_a_generator_makes_passes_of_them():
    (dataset,) = datasets(lambda: generator(6), 1, steps=2)
    assert int(dataset.cardinality()) == 2
    passes = [[int(y[0]) // 4 for _, y in itertools.islice(dataset, count)] for count in (1, 2, 2)]
    assert passes == [[0], [1, 2], [3, 4]]
    with pytest.raises(tf.errors.OpError, match=r"2 global batches were planned .* and 1 came"):
        batches(dataset)


def test_axes_that_differ_are_left_open():
    def lengths():
        for width in (3, 5, 2):
            yield np.ones((4, width, 2)), [np.ones(4), np.ones((4, width))], None

    (dataset,) = datasets(lengths, 1)
    x, (first, second) = dataset.element_spec
    assert (x.shape.as_list(), first.shape.as_list()) == ([None, None, 2], [None])
    assert second.shape.as_list() == [None, None]
    assert [x.shape for x, _ in batches(dataset)] == [(4, 3, 2), (4, 5, 2), (4, 2, 2)]


def test_arrays_of_one_batch_that_differ_in_length():
    (dataset,) = datasets(lambda: iter([batch(0), (batch(1)[0], np.arange(3))]), 1)
    with pytest.raises(tf.errors.OpError, match=r"different lengths: \[3, 4\]"):
        batches(dataset)
