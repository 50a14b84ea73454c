"""One seeded order for any number of ranks, and the split of the last samples."""

from __future__ import annotations

import numpy as np
import pytest
from keras.src.trainers.data_adapters.array_slicing import train_validation_split

from orchestrator.communicators.single import SingleCommunicator
from orchestrator.data import shard
from tests.fakes import FakeCommunicator


@pytest.mark.parametrize(
    ("length", "batch", "size"), [(40, 12, 3), (23, 4, 5), (5, 2, 4), (1, 3, 2)]
)
def test_the_order_does_not_depend_on_the_number_of_ranks(length, batch, size):
    data, options = np.arange(length), {"batch_size": batch, "shuffle": True, "seed": 8}
    alone = shard(data, SingleCommunicator(), **options)
    ranks = [shard(data, FakeCommunicator(rank, size), **options) for rank in range(size)]
    for _ in range(2):
        expected = list(alone.as_numpy_iterator())
        assert sorted(np.concatenate(expected)) == data.tolist()
        everyone = [list(dataset.as_numpy_iterator()) for dataset in ranks]
        for pieces, whole in zip(zip(*everyone, strict=True), expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize(("length", "fraction"), [(10, 0.25), (10, 0.3), (7, 0.5), (30, 0.9)])
def test_validation_is_split_off_as_keras_does(length, fraction):
    x, y = np.arange(length), np.arange(length) * 10
    (kept, _, _), (held, _, _) = train_validation_split((x, y, None), fraction)
    options = {"batch_size": 3, "shuffle": True, "validation_split": fraction}
    ranks = [shard((x, y), FakeCommunicator(rank, 2), **options) for rank in range(2)]
    for part_, expected in ((0, kept[:]), (1, held[:])):
        got = [list(pair[part_].as_numpy_iterator()) for pair in ranks]
        assert {len(batches) for batches in got} == {-(-len(expected) // 3)}
        samples = [
            np.concatenate([piece[leaf] for pieces in zip(*got, strict=True) for piece in pieces])
            for leaf in (0, 1)
        ]
        np.testing.assert_array_equal(np.sort(samples[0]), expected)
        np.testing.assert_array_equal(samples[1], samples[0] * 10)
    # Only what is trained on is shuffled.
    np.testing.assert_array_equal(samples[0], held[:])


def test_nothing_is_left_by_a_split():
    for fraction, message in ((0.9, "leaves none"), (1.0, "between 0 and 1"), (0, "between 0")):
        with pytest.raises(ValueError, match=message):
            shard(np.zeros(1), FakeCommunicator(), batch_size=1, validation_split=fraction)
