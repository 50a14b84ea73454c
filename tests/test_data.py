"""Every sample is in exactly one rank's part, whatever the shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.communicators.single import SingleCommunicator
from orchestrator.data import shard
from orchestrator.sources.base import part
from tests.fakes import FakeCommunicator


def parts(data, size: int, **options) -> list[list]:
    """What every rank gets: a list of batches a rank."""
    return [
        list(shard(data, FakeCommunicator(rank, size), **options).as_numpy_iterator())
        for rank in range(size)
    ]


@given(length=st.integers(0, 10_000), size=st.integers(1, 64))
@settings(deadline=None)
def test_part_covers_once_and_evenly(length, size):
    begin, counts = 0, []
    for rank in range(size):
        first, count = part(length, rank, size)
        assert first == begin, "contiguous, in rank order"
        begin += count
        counts.append(count)
    assert begin == length
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(length=st.integers(0, 1000), size=st.integers(1, 16), data=st.data())
@settings(deadline=None, max_examples=25)
def test_part_of_a_tensor_is_that_of_a_number(length, size, data):
    rank = data.draw(st.integers(0, size - 1))
    begin, count = part(tf.constant(length), rank, size)
    assert (int(begin), int(count)) == part(length, rank, size)


@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 12),
    size=st.integers(1, 5),
    drop=st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_dataset_parts_rebuild_every_global_batch(length, batch, size, drop):
    data = tf.data.Dataset.range(length).batch(batch, drop_remainder=drop)
    whole = list(data.as_numpy_iterator())
    ranks = parts(data, size)
    assert [len(batches) for batches in ranks] == [len(whole)] * size
    for index, expected in enumerate(whole):
        pieces = [batches[index] for batches in ranks]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@given(length=st.integers(1, 40), batch=st.integers(1, 12), size=st.integers(1, 5))
@settings(deadline=None, max_examples=10)
def test_array_parts_rebuild_every_global_batch(length, batch, size):
    x, y = np.arange(length, dtype="float32"), np.arange(length) * 2
    ranks = parts((x, y), size, batch_size=batch)
    for index in range(-(-length // batch)):
        expected = x[index * batch : (index + 1) * batch]
        np.testing.assert_array_equal(np.concatenate([r[index][0] for r in ranks]), expected)
        np.testing.assert_array_equal(np.concatenate([r[index][1] for r in ranks]), expected * 2)
    assert {len(r) for r in ranks} == {-(-length // batch)}


def test_dtypes_and_shapes_are_kept():
    x, y = np.zeros((6, 3), "float16"), np.zeros((6,), "int8")
    dataset = shard((x, y), FakeCommunicator(0, 2), batch_size=4)
    spec: Any = dataset.element_spec
    assert [leaf.dtype for leaf in spec] == [tf.float16, tf.int8]
    first, *_ = dataset.as_numpy_iterator()
    assert first[0].shape == (2, 3)


def test_dicts_and_nesting_of_arrays():
    data = ({"a": np.arange(6), "b": np.arange(12).reshape(6, 2)}, np.arange(6) * 10)
    first, second = parts(data, 2, batch_size=6)
    ((x, y),) = first
    np.testing.assert_array_equal(x["a"], [0, 1, 2])
    np.testing.assert_array_equal(x["b"], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(y, [0, 10, 20])
    np.testing.assert_array_equal(second[0][0]["a"], [3, 4, 5])


def test_dicts_and_tuples_of_datasets():
    for make in (
        lambda i: {"a": i, "b": i * 2},
        lambda i: (i, i * 2),
        lambda i: (i, i * 2, i * 3),
        lambda i: ({"a": i}, i * 2),
        lambda i: (i,),
        lambda i: i,
    ):
        data = tf.data.Dataset.range(5).map(make).batch(5)
        ranks = parts(data, 2)
        pieces = [tf.nest.flatten(batches[0])[0] for batches in ranks]
        np.testing.assert_array_equal(np.concatenate(pieces), np.arange(5))
        single = next(iter(data.as_numpy_iterator()))
        assert type(ranks[0][0]) is type(single)
        assert len(tf.nest.flatten(ranks[0][0])) == len(tf.nest.flatten(single))


def test_shuffled_arrays_share_one_order_that_changes():
    x = np.arange(50)

    def epochs(rank: int, seed: int) -> list[np.ndarray]:
        dataset = shard(x, FakeCommunicator(rank, 2), batch_size=10, shuffle=True, seed=seed)
        return [np.stack(list(dataset.as_numpy_iterator())) for _ in range(2)]

    one, two = epochs(0, 5), epochs(1, 5)
    for mine, theirs in zip(one, two, strict=True):
        together = np.concatenate([mine.ravel(), theirs.ravel()])
        np.testing.assert_array_equal(np.sort(together), x)
    assert not np.array_equal(one[0], one[1]), "a new order each epoch"
    assert not np.array_equal(one[0], epochs(0, 6)[0]), "the seed decides"
    np.testing.assert_array_equal(one[0], epochs(0, 5)[0])


def test_one_rank_gets_everything():
    data = tf.data.Dataset.range(5).batch(2)
    batches = list(shard(data, SingleCommunicator()).as_numpy_iterator())
    assert [b.tolist() for b in batches] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("target", [(4,), (4, 1), (4, 2, 2)])
def test_unbatched(size, target):
    """Seen by a scalar, or by first axes of several lengths: no batch has that."""
    images = tf.data.Dataset.from_tensor_slices((np.zeros((4, 8)), np.zeros(target)))
    with pytest.raises(ValueError, match=r"dataset\.batch\(global_batch_size\)"):
        shard(images, FakeCommunicator(0, size))
    for drop in (False, True):
        shard(images.batch(2, drop_remainder=drop), FakeCommunicator(0, size))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((np.zeros(3), np.zeros(4)), {"batch_size": 2}, "as many samples"),
        (np.float32(3), {"batch_size": 2}, "as many samples"),
        (np.zeros(3), {}, "batch_size=64"),
        (np.zeros(3), {"batch_size": 0}, "batch_size=0"),
        (tf.data.Dataset.range(4).batch(2), {"batch_size": 2}, "for arrays only"),
        (tf.data.Dataset.range(4).batch(2), {"shuffle": True}, "for arrays only"),
    ],
)
def test_bad_arguments(data, options, message):
    communicator = FakeCommunicator()
    with pytest.raises(ValueError, match=message):
        shard(data, communicator, **options)
    assert communicator.calls == ["allgather_object"], "the other ranks learn of it"


@pytest.mark.parametrize(
    ("mine", "theirs", "options"),
    [
        (np.zeros(30), np.zeros(29), {"batch_size": 4}),
        (np.zeros((30, 2)), np.zeros((30, 3)), {"batch_size": 4}),
        (np.zeros(30, "float32"), np.zeros(30, "float64"), {"batch_size": 4}),
        (tf.data.Dataset.range(9).batch(3), tf.data.Dataset.range(12).batch(3), {}),
        (
            tf.data.Dataset.range(9).batch(3, drop_remainder=True),
            tf.data.Dataset.range(9).batch(3),
            {},
        ),
    ],
)
def test_different_data_across_ranks(mine, theirs, options):
    said = []
    shard(theirs, FakeCommunicator(1, 2, gather=lambda obj: said.append(obj) or [obj]), **options)
    for rank in (0, 1):
        other = [said[0]] * 2
        everyone = [*other]

        def gather(obj, rank=rank, everyone=everyone):
            everyone[rank] = obj
            return everyone

        with pytest.raises(ValueError, match="not alike"):
            shard(mine, FakeCommunicator(rank, 2, gather=gather), **options)


def test_an_error_of_another_rank_is_raised_here():
    def gather(obj):
        return [obj, ("", (True, "something is wrong there"), None)]

    with pytest.raises(ValueError, match="something is wrong there"):
        shard(np.zeros(4), FakeCommunicator(gather=gather), batch_size=2)


@pytest.mark.parametrize(
    "data",
    [
        tf.data.Dataset.range(4).batch(2),
        iter([np.arange(2)] * 4),
        (np.zeros(4), np.zeros(4)),
    ],
)
def test_what_every_rank_reads_whole_is_said(data):
    told = []
    for size in (1, 2):
        batch_size = 2 if isinstance(data, tuple) else None
        shard(data, FakeCommunicator(0, size), say=told.append, batch_size=batch_size)
    assert len(told) == (0 if isinstance(data, tuple) else 1)
    assert all("Every rank" in message and "TFRecordFiles" in message for message in told)


def test_another_error_of_another_rank_names_it():
    def gather(obj):
        return [obj, ("", (False, "no such file"), None)]

    with pytest.raises(RuntimeError, match="Rank 1 could not open its data: no such file"):
        shard(np.zeros(4), FakeCommunicator(gather=gather), batch_size=2)


def test_one_small_collective_in_all():
    communicator = FakeCommunicator()
    dataset = shard(np.arange(8), communicator, batch_size=4)
    assert len(list(dataset)) == 2
    assert communicator.calls == ["allgather_object"]


def early(count: int) -> Any:
    """A dataset that doesn't know its length."""
    return tf.data.Dataset.range(count).filter(lambda i: i >= 0).batch(2)


def test_steps_plan_a_pass_of_unknown_length():
    dataset = shard(early(8), FakeCommunicator(0, 2), steps=3)
    assert int(dataset.cardinality()) == 3
    for _ in range(2):
        assert [b.tolist() for b in dataset.as_numpy_iterator()] == [[0], [2], [4]]
    assert int(shard(early(8), FakeCommunicator(0, 2)).cardinality()) == -2


@pytest.mark.parametrize("size", [1, 2])
def test_data_that_ends_early_raises_and_says_where(size):
    rank = size - 1
    dataset = shard(early(7), FakeCommunicator(rank, size), steps=6)
    seen = []

    def read():
        seen.extend(dataset.as_numpy_iterator())

    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=f"The data of rank {rank} ended early: 6 global batches were planned .* and 4 came",
    ):
        read()
    assert len(seen) == 4, "what there is comes first"


def test_a_dataset_that_promised_more_raises():
    lying = early(7).apply(tf.data.experimental.assert_cardinality(6))
    dataset = shard(lying, FakeCommunicator(1, 2))
    with pytest.raises(tf.errors.OpError, match="6 elements but contained only 4"):
        list(dataset)


def test_planned_batches_keep_their_kinds():
    """Ragged tensors, dicts and static shapes pass through the check."""
    ragged = tf.ragged.constant([[1], [2, 3], [], [4]])
    data: Any = {"r": ragged, "x": np.ones((4, 3), "float32")}
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(4, drop_remainder=True)
    got = shard(dataset.repeat(), FakeCommunicator(0, 2), steps=1)
    spec: Any = got.element_spec
    assert spec["x"].shape.as_list() == [2, 3]
    (batch,) = got
    assert batch["r"].to_list() == [[1], [2, 3]]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.zeros(4), {"batch_size": 2, "steps": 3}, "steps=3.* has 2 batches"),
        (tf.data.Dataset.range(4).batch(2), {"steps": 3}, "steps=3.* has 2 batches"),
        (tf.data.Dataset.range(4).batch(2), {"steps": 0}, "steps=0"),
        (tf.data.Dataset.range(4).batch(2), {"validation_split": 0.5}, "arrays and files only"),
    ],
)
def test_steps_and_splits_out_of_place(data, options, message):
    with pytest.raises(ValueError, match=message):
        shard(data, FakeCommunicator(), **options)


def test_fewer_steps_than_batches():
    dataset = shard(np.arange(6), FakeCommunicator(0, 2), batch_size=2, steps=2)
    assert [batch.tolist() for batch in dataset.as_numpy_iterator()] == [[0], [2]]
