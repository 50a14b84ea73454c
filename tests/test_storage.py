"""Files that are whole or not there, on a disk and elsewhere."""

from __future__ import annotations

import errno
import os
import stat

import fsspec
import pytest

from orchestrator import storage
from orchestrator.config import SettingError
from tests.disks import NotHereError, small_disk


@pytest.fixture
def memory():
    """A folder on fsspec's in-memory filesystem."""
    fs = fsspec.filesystem("memory")
    yield "memory://tests/storage"
    if fs.exists("/tests"):
        fs.rm("/tests", recursive=True)


def write(text: str):
    def function(path: str) -> None:
        with open(path, "w") as file:
            file.write(text)

    return function


def failing(error: BaseException, text: str = "half"):
    def function(path: str) -> None:
        write(text)(path)
        raise error

    return function


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("runs/a", "best.keras", "runs/a/best.keras"),
        ("runs/a/", "best.keras", "runs/a/best.keras"),
        ("s3://bucket/a", "x/best.keras", "s3://bucket/a/x/best.keras"),
        ("runs/a", "/tmp/best.keras", "/tmp/best.keras"),
        ("runs/a", "s3://bucket/best.keras", "s3://bucket/best.keras"),
    ],
)
def test_join(folder, name, joined):
    assert storage.join(folder, name) == joined


def test_resolve_expands_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    fs, path = storage.resolve("~/runs")
    assert path == "/home/someone/runs"
    assert fs.protocol == ("file", "local")


def test_replace_makes_folders_and_replaces(tmp_path):
    target = tmp_path / "a" / "b" / "file.keras"
    storage.replace(str(target), write("one"))
    assert target.read_text() == "one"
    storage.replace(f"file://{target}", write("two"))
    assert target.read_text() == "two"
    assert os.listdir(target.parent) == ["file.keras"]


def test_replace_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.replace("plain.txt", write("here"))
    assert (tmp_path / "plain.txt").read_text() == "here"
    assert os.listdir(tmp_path) == ["plain.txt"]


def test_the_temporary_name_keeps_the_suffix_and_the_folder(tmp_path):
    seen = []

    def function(path: str) -> None:
        seen.append(path)
        write("x")(path)

    storage.replace(str(tmp_path / "best.weights.h5"), function)
    (path,) = seen
    assert os.path.dirname(path) == str(tmp_path)
    assert path.endswith(".weights.h5")
    assert os.path.basename(path).startswith(".tmp-")


def test_order_of_write_fsync_rename_fsync(tmp_path, monkeypatch):
    """The file is on the disk before the name is, and the name before `replace` returns."""
    steps = []
    fsync, rename = os.fsync, os.replace

    def spied_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        steps.append(f"fsync {kind}")
        fsync(descriptor)

    def spied_rename(source: str, target: str) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_rename)
    storage.replace(str(tmp_path / "f"), write("x"))
    assert steps == ["fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)):
        storage.replace(str(target), failing(error))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_fsync_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.replace(str(target), write("new"))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        with small_disk(disk, 65536):
            target = disk / "file"
            storage.replace(str(target), write("old"))
            with pytest.raises(OSError, match="No space left"):
                storage.replace(str(target), write("n" * 200_000))
            assert target.read_text() == "old"
            assert os.listdir(disk) == ["file"]
            storage.replace(str(target), write("new"))  # the room is free again
            assert target.read_text() == "new"
    except NotHereError as reason:
        pytest.skip(str(reason))


def test_a_folder_in_the_way(tmp_path):
    target = tmp_path / "best.keras"
    target.mkdir()
    called = []
    with pytest.raises(IsADirectoryError, match=r"best\.keras is a folder"):
        storage.replace(str(target), called.append)
    assert not called
    assert os.listdir(tmp_path) == ["best.keras"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"file"):
        storage.replace(str(tmp_path / "file" / "below" / "best.keras"), write("y"))
    assert (tmp_path / "file").read_text() == "x"


def test_replace_elsewhere(memory):
    url = f"{memory}/deep/best.keras"
    storage.replace(url, write("one"))
    storage.replace(url, write("two"))
    fs = fsspec.filesystem("memory")
    assert fs.cat_file("/tests/storage/deep/best.keras") == b"two"
    with pytest.raises(RuntimeError):
        storage.replace(url, failing(RuntimeError("no")))
    assert fs.cat_file("/tests/storage/deep/best.keras") == b"two"
    assert [os.path.basename(p) for p in fs.ls("/tests/storage/deep", detail=False)] == [
        "best.keras"
    ]


def test_the_spool_keeps_the_name_and_goes(memory):
    seen = []

    def function(path: str) -> None:
        seen.append(path)
        write("x")(path)

    storage.replace(f"{memory}/best.weights.h5", function)
    assert os.path.basename(seen[0]) == "best.weights.h5"
    assert not os.path.exists(os.path.dirname(seen[0]))


def test_write_text_is_utf8(tmp_path):
    storage.write_text(str(tmp_path / "t"), "größe €\n")
    assert (tmp_path / "t").read_bytes() == "größe €\n".encode()


def test_lines_on_a_disk(tmp_path):
    path = tmp_path / "deep" / "lines"
    lines = storage.Lines(str(path))
    assert path.read_text() == ""
    lines.append("one")
    assert path.read_text() == "one\n"
    lines.append("zwei ä")
    assert path.read_text(encoding="utf-8") == "one\nzwei ä\n"
    storage.Lines(str(path))
    assert path.read_text() == ""


def test_lines_elsewhere(memory):
    lines = storage.Lines(f"{memory}/lines")
    fs = fsspec.filesystem("memory")
    assert fs.cat_file("/tests/storage/lines") == b""
    lines.append("one")
    lines.append("two")
    assert fs.cat_file("/tests/storage/lines") == b"one\ntwo\n"


def test_remove(tmp_path, memory):
    for url in (str(tmp_path / "f"), f"{memory}/f"):
        fs, path = storage.resolve(url)
        storage.write_text(url, "x")
        assert fs.exists(path)
        storage.remove(url)
        assert not fs.exists(path)
        storage.remove(url)  # where there is none, nothing is done


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_preflight(tmp_path, memory, kind):
    url = str(tmp_path / "new" / "folder") if kind == "disk" else memory
    storage.preflight(url)
    fs, path = storage.resolve(url)
    assert fs.find(path) == []


def test_preflight_of_a_place_in_use_leaves_it_as_it_was(tmp_path):
    (tmp_path / "file").write_text("x")
    storage.preflight(str(tmp_path))
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(SettingError, match="A file is in the way of a folder"):
        storage.preflight(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "full"), OSError, "The disk is full: free some of it"),
        (OSError("Can't write (errno = 28, ...)"), OSError, "The disk is full: free some of it"),
        (OSError(errno.EDQUOT, "quota"), OSError, "The disk is full: free some of it"),
        (OSError(errno.EROFS, "read-only"), SettingError, "choose another place"),
        (PermissionError(errno.EACCES, "no"), SettingError, "Check the credentials"),
        (OSError("Forbidden: b/x"), SettingError, "Check the credentials"),
    ],
)
def test_the_usual_mistakes_are_explained(error, kind, message):
    with pytest.raises(kind, match=message) as caught, storage.explained("s3://bucket/run"):
        raise error
    assert str(caught.value).count("s3://bucket/run") == 1
    assert caught.value.__cause__ is error


def test_other_errors_stay_as_they_are():
    error = RuntimeError("something")
    with pytest.raises(RuntimeError) as caught, storage.explained("s3://bucket/run"):
        raise error
    assert caught.value is error
    with pytest.raises(FileNotFoundError), storage.explained("s3://bucket/run"):
        os.listdir("/no/such/local/folder")  # not a bucket


def test_a_full_disk_is_told_at_the_preflight(tmp_path, monkeypatch):
    def full(self, path: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.pipe_file", full)
    with pytest.raises(OSError, match="free some of it"):
        storage.preflight(str(tmp_path))


@pytest.mark.parametrize(("url", "extra"), [("s3://b/x", "s3"), ("gs://b/x", "gcs")])
def test_a_missing_extra_is_named(monkeypatch, url, extra):
    def missing(*_, **__):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(SettingError, match=rf"pip install 'keras-orchestrator\[{extra}\]'"):
        storage.resolve(url)


def test_an_unknown_kind_of_url_is_told():
    with pytest.raises(SettingError, match="nonesuch://bucket"):
        storage.resolve("nonesuch://bucket/x")


def test_given_options_go_before_ours():
    fs, _ = storage.resolve("s3://bucket/x", {"key": "a", "secret": "b", "max_concurrency": 2,
                            "config_kwargs": {"read_timeout": 7}})  # fmt: skip
    assert fs.max_concurrency == 2
    assert fs.default_block_size == 16 * 2**20
    assert fs.config_kwargs["read_timeout"] == 7
    assert fs.config_kwargs["connect_timeout"] == 10
