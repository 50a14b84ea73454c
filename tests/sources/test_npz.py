"""`.npz` files are read by row: the values, the bytes, and what can't be read so."""

from __future__ import annotations

import io
import zipfile

import fsspec
import numpy as np
import pytest

from orchestrator import NpzFiles
from tests.sources.parts import (
    CountedFileSystem,
    alike,
    batches,
    datasets,
    global_batches,
    put_together,
    refused_on_all,
)

LENGTHS = [5, 0, 7, 1]


def arrays(length: int, first: int = 0) -> dict[str, np.ndarray]:
    numbers = np.arange(first, first + length)
    return {
        "x": (numbers[:, None, None] * 6 + np.arange(6).reshape(2, 3)).astype("float32"),
        "y": numbers.astype("int64"),
        "flag": numbers % 3 == 0,
        "big": numbers.astype(">i4"),
        "none": np.zeros((length, 0), "float32"),
    }


def write(folder, lengths=LENGTHS, save=np.savez, change=lambda arrays: arrays):
    """Files numbered through, and all of it in one."""
    paths, first, whole = [], 0, []
    for file, length in enumerate(lengths):
        paths.append(str(folder / f"data-{file}.npz"))
        whole.append(arrays(length, first))
        save(paths[-1], **change(whole[-1]))
        first += length
    return paths, {name: np.concatenate([w[name] for w in whole]) for name in whole[0]}


def cut_up(whole, batch_size):
    """Global batches, as `NpzFiles` gives them: in the machine's byte order."""
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in whole.items()}
    length = len(whole["y"])
    return [
        {name: array[begin : begin + batch_size] for name, array in native.items()}
        for begin in range(0, length, batch_size)
    ]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_come_in_the_files_order(tmp_path, save, size):
    paths, whole = write(tmp_path, save=save)
    alike(global_batches(NpzFiles(paths), size, batch_size=4), cut_up(whole, 4))
    pattern = NpzFiles(str(tmp_path / "*.npz"), select=("y", "x"))
    expected = [(batch["y"], batch["x"]) for batch in cut_up(whole, 4)]
    alike(global_batches(pattern, size, batch_size=4), expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_shuffling_is_global_and_the_same_for_every_number_of_ranks(tmp_path, save):
    paths, whole = write(tmp_path, save=save)
    orders = []
    for size in (1, 3):
        ranks = datasets(NpzFiles(paths), size, batch_size=4, shuffle=True, seed=1)
        for _ in range(2):
            epoch = put_together([batches(each) for each in ranks])
            order = np.concatenate([batch["y"] for batch in epoch])
            np.testing.assert_array_equal(
                np.concatenate([batch["x"] for batch in epoch]), whole["x"][order]
            )
            orders.append(order.tolist())
    assert orders[:2] == orders[2:]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(13))
    assert orders[0] != orders[1]


def put(folder, save=np.savez):
    """On the filesystem that counts: four files of 16 rows of 4 kB."""
    urls = []
    for file in range(4):
        buffer = io.BytesIO()
        x = np.random.default_rng(file).standard_normal((16, 1000)).astype("float32")
        save(buffer, x=x, y=np.arange(16))
        urls.append(f"counted://{folder.name}/{file}.npz")
        fsspec.filesystem("counted").pipe_file(urls[-1], buffer.getvalue())
    CountedFileSystem.bytes_read()
    return urls


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_rank_reads_its_own_bytes(tmp_path, size, shuffle):
    ranks = datasets(NpzFiles(put(tmp_path)), size, batch_size=8, shuffle=shuffle)
    looked = CountedFileSystem.bytes_read()
    assert looked < 8 * 5000, "names and shapes: one small reading an array, by one rank"
    for dataset in ranks:
        batches(dataset)
        assert CountedFileSystem.bytes_read() == 64 * (4000 + 8) / size


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_is_read_whole_is_said(tmp_path, save):
    said = []
    ranks = datasets(NpzFiles(put(tmp_path, save)), 2, batch_size=8, say=said.append)
    compressed = save is np.savez_compressed
    assert len(said) == (2 if compressed else 0), "by each rank; Runtime.say_once makes it one"
    assert all("8 array(s) in .npz files are compressed" in message for message in said)
    CountedFileSystem.bytes_read()
    for dataset in ranks if compressed else ():
        batches(dataset)
        assert CountedFileSystem.bytes_read() > 64 * 3000
        batches(dataset)
        assert CountedFileSystem.bytes_read() == 0, "kept in memory"


def test_an_array_in_fortran_order_is_read_whole(tmp_path):
    said = []
    paths, whole = write(tmp_path, change=lambda a: {**a, "x": np.asfortranarray(a["x"])})
    alike(global_batches(NpzFiles(paths), 2, batch_size=5, say=said.append), cut_up(whole, 5))
    assert "in Fortran order" in said[0]


def test_a_longer_header_in_the_file_than_in_its_directory(tmp_path):
    """As aligned archives have it; the places of the rows must count it."""
    path = tmp_path / "padded.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.arange(6, dtype="int32"))
    info = zipfile.ZipInfo("y.npy")
    info.extra = b"\xff\xff\x04\x00pads"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, buffer.getvalue())
        archive.filelist[0].extra = b""
    (batch,) = global_batches(NpzFiles(str(path)), 2, batch_size=6)
    assert batch["y"].tolist() == [0, 1, 2, 3, 4, 5]


def with_objects(arrays):
    return {**arrays, "y": np.array([{"a": 1}] * len(arrays["y"]), object)}


def with_a_scalar(arrays):
    return {**arrays, "scale": np.float32(2)}


def without_y(arrays):
    return arrays if arrays["y"][0] == 0 else {"x": arrays["x"]}


def wider(arrays):
    return arrays if arrays["y"][0] == 0 else {**arrays, "x": arrays["x"][:, :, :1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_objects, r"y\.npy is an array of Python objects"),
        (lambda a: {**a, "y": a["y"][1:]}, "as many samples"),
        (with_a_scalar, "as many samples"),
        (without_y, "all files must hold the same arrays"),
        (wider, "all files must hold the same arrays"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    paths, _ = write(tmp_path, [4, 4], change=change)
    refused_on_all(2, NpzFiles(paths), message)


def test_a_name_or_a_file_that_is_none(tmp_path):
    paths, _ = write(tmp_path)
    with pytest.raises(ValueError, match=r"data-0\.npz has no \['z'\]; it has \['big', 'flag'"):
        datasets(NpzFiles(paths, select=("x", "z")), 1, batch_size=2)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz is no \.npz file"):
        datasets(NpzFiles(str(tmp_path / "text.npz")), 1, batch_size=2)
    with pytest.raises(ValueError, match="one or more files"):
        NpzFiles([])
