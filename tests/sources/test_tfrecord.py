"""TFRecord files are read by record: the values, the bytes, and what is said of damaged files."""

from __future__ import annotations

import gzip
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tensorflow as tf

from orchestrator import TFRecordFiles
from orchestrator.data import shard
from tests.distributed import threads
from tests.sources.parts import (
    CountedFileSystem,
    alike,
    batches,
    datasets,
    global_batches,
    put_together,
    refused_on_all,
)

LENGTHS = [5, 0, 7, 1]  # records a file; one is empty


def record(number: int, padding: int = 0) -> bytes:
    """One of a length of its own, ending in bytes that a string would lose."""
    feature = tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))
    text = tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[b"x" * (number + padding) + b"\0"])
    )
    features = tf.train.Features(feature={"number": feature, "text": text})
    return tf.train.Example(features=features).SerializeToString()


def write(folder: Path, lengths: list[int], padding: int = 0) -> list[str]:
    """Files numbered through, by TensorFlow's own writer."""
    paths, number = [], 0
    for file, length in enumerate(lengths):
        paths.append(str(folder / f"data-{file}.tfrecord"))
        with tf.io.TFRecordWriter(paths[-1]) as writer:
            for _ in range(length):
                writer.write(record(number, padding))
                number += 1
    return paths


def put(folder: Path, lengths: list[int], padding: int = 0) -> list[str]:
    """As `write`, on the filesystem that counts."""
    urls = []
    for path in write(folder, lengths, padding):
        urls.append(f"counted://{folder.name}/{Path(path).name}")
        fsspec.filesystem("counted").pipe_file(urls[-1], Path(path).read_bytes())
    CountedFileSystem.bytes_read()
    return urls


def parse(serialized):
    features = {"number": tf.io.FixedLenFeature([], tf.int64)}
    number = tf.io.parse_single_example(serialized, features)["number"]
    return {"x": tf.fill([2], tf.cast(number, tf.float32))}, number


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_records_come_whole_and_in_the_files_order(tmp_path, size):
    paths = write(tmp_path, LENGTHS)
    expected = list(tf.data.TFRecordDataset(paths).batch(4).as_numpy_iterator())
    for urls in (paths, str(tmp_path / "data-*.tfrecord")):
        alike(global_batches(TFRecordFiles(urls), size, batch_size=4), expected)
    # In the order of the list, where it is one.
    turned = list(tf.data.TFRecordDataset(paths[::-1]).batch(4).as_numpy_iterator())
    alike(global_batches(TFRecordFiles(paths[::-1]), size, batch_size=4), turned)


@pytest.mark.parametrize("size", [1, 3])
def test_parse_makes_the_samples(tmp_path, size):
    """With one sample a batch two of three ranks have empty parts, which have a shape as well."""
    paths = write(tmp_path, LENGTHS)
    for batch_size in (6, 1):
        expected = list(
            tf.data.TFRecordDataset(paths).map(parse).batch(batch_size).as_numpy_iterator()
        )
        alike(global_batches(TFRecordFiles(paths, parse), size, batch_size=batch_size), expected)


def test_shuffling_is_global_and_the_same_for_every_number_of_ranks(tmp_path):
    paths = write(tmp_path, LENGTHS)
    options = {"batch_size": 4, "shuffle": True, "seed": 3}
    orders = []
    for size in (1, 2, 5):
        ranks = datasets(lambda: TFRecordFiles(paths, parse), size, **options)
        epochs = [put_together([batches(each) for each in ranks]) for _ in range(2)]
        orders.append([np.concatenate([y for _, y in epoch]).tolist() for epoch in epochs])
    assert orders[0] == orders[1] == orders[2]
    first, second = orders[0]
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    assert set(first[:4]) - set(range(5)), "samples of several files in the first batch"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_rank_reads_its_own_bytes(tmp_path, size, shuffle):
    urls = put(tmp_path, [16, 16, 16, 16], padding=5000)
    whole = sum(fsspec.filesystem("counted").size(url) for url in urls)
    ranks = datasets(TFRecordFiles(urls), size, batch_size=8, shuffle=shuffle)
    scanned = CountedFileSystem.bytes_read()
    assert scanned == 64 * 12, "the records' heads, each by one rank"
    for dataset in ranks:
        batches(dataset)
        read = CountedFileSystem.bytes_read()
        assert read == pytest.approx(whole / size, rel=0.01)


def test_records_that_follow_each_other_are_one_request(tmp_path, monkeypatch):
    urls = put(tmp_path, [8, 8])
    (dataset,) = datasets(TFRecordFiles(urls), 1, batch_size=16)
    asked = []
    real = CountedFileSystem.cat_ranges

    def cat_ranges(self, paths, starts, ends, **options):
        asked.append(len(paths))
        return real(self, paths, starts, ends, **options)

    monkeypatch.setattr(CountedFileSystem, "cat_ranges", cat_ranges)
    assert len(batches(dataset)[0]) == 16
    assert asked == [2], "one a file"


def cut(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-3])


def cut_in_a_head(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"\1\2\3\4\5")


def compress(path: str) -> None:
    Path(path).write_bytes(gzip.compress(Path(path).read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"data-2\.tfrecord is cut: its last TFRecord, number 7"),
        (cut_in_a_head, r"data-2\.tfrecord is cut"),
        (compress, r"data-2\.tfrecord has no TFRecord at byte 0 .* compressed"),
    ],
)
def test_a_file_that_is_none_is_an_error_on_all_ranks(tmp_path, damage, message):
    paths = write(tmp_path, LENGTHS)
    damage(paths[2])
    refused_on_all(3, TFRecordFiles(paths), message)


def test_a_file_that_is_missing_is_an_error_on_all_ranks(tmp_path):
    paths = [*write(tmp_path, LENGTHS), str(tmp_path / "none.tfrecord")]

    def told(communicator):
        with pytest.raises((FileNotFoundError, RuntimeError)) as caught:
            shard(TFRecordFiles(paths), communicator, batch_size=2)
        return type(caught.value), "none.tfrecord" in str(caught.value)

    # The fifth file is looked into by the second of three ranks.
    assert threads.run(3, told) == [
        (RuntimeError, True),
        (FileNotFoundError, True),
        (RuntimeError, True),
    ]
    with pytest.raises(FileNotFoundError, match=r"nothing-\*"):
        TFRecordFiles(str(tmp_path / "nothing-*"))


@pytest.mark.parametrize("theirs", [[0, 1, 2], [0, 1, 4, 3, 2, 5, 6]])
def test_other_files_on_another_rank(tmp_path, theirs):
    """One less, or others in the middle of many."""
    paths = write(tmp_path, [1] * 7)

    def told(communicator):
        own = [paths[file] for file in theirs] if communicator.rank else paths
        with pytest.raises(ValueError, match="not alike"):
            shard(TFRecordFiles(own), communicator, batch_size=2)

    threads.run(2, told)


def test_damaged_data_is_found_where_it_is_read(tmp_path):
    path, _ = write(tmp_path, [3, 1])
    data = bytearray(Path(path).read_bytes())
    begin = 12 + len(record(0)) + 4
    data[begin + 14] ^= 1
    Path(path).write_bytes(data)
    (dataset,) = datasets(TFRecordFiles(path), 1, batch_size=2)
    with pytest.raises(tf.errors.OpError, match=rf"data-0\.tfrecord: .* at byte {begin} is dam"):
        batches(dataset)


def test_a_file_that_shrinks_is_found_where_it_is_read(tmp_path):
    path, _ = write(tmp_path, [3, 1])
    (dataset,) = datasets(TFRecordFiles(path), 1, batch_size=2)
    cut(path)
    with pytest.raises(tf.errors.OpError, match=r"data-0\.tfrecord ends too early"):
        batches(dataset)


def test_samples_of_unknown_shape_are_refused(tmp_path):
    files = TFRecordFiles(write(tmp_path, [2]), lambda s: tf.io.decode_raw(s, tf.uint8))
    with pytest.raises(ValueError, match=r"tf\.ensure_shape"):
        datasets(files, 1, batch_size=2)
