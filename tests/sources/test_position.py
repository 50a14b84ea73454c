"""Where a pass begins: what is left out, what is read, and which order comes."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator.communicators.single import SingleCommunicator
from orchestrator.data import shard
from orchestrator.sources.position import Position


def test_what_is_left_out_goes_over_from_pass_to_pass():
    position = Position()
    assert position.begin(4) == (0, 0)
    position.passes, position.skip = 5, 6
    assert [position.begin(4) for _ in range(3)] == [(5, 4), (6, 2), (7, 0)]
    assert position.passes == 8


def test_without_end():
    position = Position()
    position.skip = 9
    assert position.begin(None) == (0, 9)


def passes(dataset, number):
    return [[np.asarray(batch).ravel().tolist() for batch in dataset] for _ in range(number)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_arrays_go_on_in_the_order_of_their_pass(shuffle):
    x = np.arange(10)
    whole = passes(shard(x, SingleCommunicator(), batch_size=4, shuffle=shuffle, seed=3), 3)
    position = Position()
    dataset = shard(
        x, SingleCommunicator(), batch_size=4, shuffle=shuffle, seed=3, position=position
    )
    position.passes, position.skip = 1, 2
    first, second = passes(dataset, 2)
    assert first == [[], [], whole[1][2]]
    assert second == whole[2]
    assert position.passes == 3


class Read(keras.utils.PyDataset):
    """Batches of two numbers, put into another order at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.asked, self.order, self.calls = [], list(range(5)), []

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.asked.append(index)
        return (np.full((2, 1), self.order[index]),)

    def on_epoch_begin(self):
        self.calls.append("begin")

    def on_epoch_end(self):
        self.calls.append("end")
        self.order.append(self.order.pop(0))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("skip", [0, 3, 5])
def test_a_pydataset_is_asked_for_what_is_left_alone(shuffle, skip):
    options = {"shuffle": shuffle, "seed": 2}
    whole = passes(shard(Read(), SingleCommunicator(), **options), 4)
    position, data = Position(), Read()
    dataset = shard(data, SingleCommunicator(), position=position, **options)
    data.asked.clear()
    position.passes, position.skip = 2, skip
    third, fourth = passes(dataset, 2)
    assert third == [[]] * skip + whole[2][skip:]
    assert fourth == whole[3]
    assert len(data.asked) == 10 - skip
    assert data.calls == ["begin", "end"] * 4
