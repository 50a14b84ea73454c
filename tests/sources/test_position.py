"""Where a pass begins: what is left out, what is read, and which order comes."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator import NpzFiles, TFRecordFiles
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.data import shard
from orchestrator.sources.position import Position
from tests.distributed import threads
from tests.sources import parts, test_npz, test_tfrecord


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


def framed(batch):
    """A TFRecord's bytes, and those of its length and checksums."""
    return sum(len(record) + 16 for record in batch)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("skip", [0, 5, 8])
@pytest.mark.parametrize(
    ("make", "size_of"),
    [
        (lambda folder: TFRecordFiles(test_tfrecord.put(folder, [16] * 4, 5000)), framed),
        (lambda folder: NpzFiles(test_npz.put(folder)), lambda batch: 4008 * len(batch["y"])),
    ],
    ids=["TFRecord", "npz"],
)
def test_files_go_on_and_nothing_before_is_read(tmp_path, make, size_of, skip, shuffle):
    """Two ranks, in the second of two passes: of 8 batches some are left out."""
    files, options = make(tmp_path), {"batch_size": 8, "shuffle": shuffle, "seed": 3}
    whole = parts.datasets(files, 2, **options)
    _, second = [parts.put_together([parts.batches(one) for one in whole]) for _ in "12"]

    def gone_on(communicator):
        position = Position()
        position.passes, position.skip = 1, skip
        return shard(files, communicator, position=position, **options)

    datasets = threads.run(2, gone_on)
    parts.CountedFileSystem.bytes_read()
    ranks = [parts.batches(dataset) for dataset in datasets]
    left = parts.put_together(ranks)
    parts.alike(left[skip:], second[skip:])
    assert [size_of(batch) for batch in left[:skip]] == [0] * skip
    assert parts.CountedFileSystem.bytes_read() == sum(map(size_of, second[skip:]))
