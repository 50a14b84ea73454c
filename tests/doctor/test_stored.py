"""An object tried at a URL, and nothing left of it."""

from __future__ import annotations

import os

import fsspec
import pytest

from orchestrator import storage
from orchestrator.doctor import stored
from tests.checkpoint import servers


@pytest.fixture
def memory():
    """fsspec's in-memory filesystem, and a folder of ours there."""
    fs = fsspec.filesystem("memory")
    yield fs
    if fs.exists("/doctor"):
        fs.rm("/doctor", recursive=True)


def test_a_folder_that_is_there(tmp_path):
    found = stored.check(str(tmp_path), size=1000)
    assert (found.url, found.bytes, found.failed, found.error) == (str(tmp_path), 1000, "", "")
    assert list(found.seconds) == ["write", "read", "list", "delete"]
    assert all(0 < took < 60 for took in found.seconds.values())
    assert os.listdir(tmp_path) == []


def test_a_new_folder_goes_again(tmp_path):
    assert stored.check(f"file://{tmp_path}/a/b").error == ""
    assert os.listdir(tmp_path) == []


def test_elsewhere(memory):
    found = stored.check("memory://doctor/run")
    assert found.error == ""
    assert list(found.seconds) == list(stored.STEPS)
    assert memory.find("/doctor") == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    found = stored.check(str(tmp_path / "file"))
    assert (found.failed, found.seconds) == ("write", {})
    assert "A file is in the way of a folder" in found.error
    assert (tmp_path / "file").read_text() == "x"


def test_an_unknown_kind_of_url():
    found = stored.check("nonesuch://bucket")
    assert found.failed == "write"
    assert "nonesuch" in found.error


@pytest.mark.parametrize(
    ("method", "failed", "done"),
    [
        ("pipe_file", "write", []),
        ("cat_file", "read", ["write"]),
        ("ls", "list", ["write", "read"]),
        ("rm_file", "delete", ["write", "read", "list"]),
    ],
)
def test_a_step_that_is_not_allowed(memory, monkeypatch, method, failed, done):
    def refuse(*args, **kwargs):
        raise PermissionError("not you")

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), method, refuse)
        found = stored.check("memory://doctor/run")
    assert (found.failed, list(found.seconds)) == (failed, done)
    assert "not you. Check the credentials" in found.error
    if method != "rm_file":
        assert memory.find("/doctor") == []


def test_other_bytes_come_back(memory, monkeypatch):
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path: b"other")
    found = stored.check("memory://doctor/run")
    assert found.failed == "compare"
    assert "gave back other bytes" in found.error
    assert memory.find("/doctor") == []


def test_what_was_written_is_not_listed(memory, monkeypatch):
    monkeypatch.setattr(type(memory), "ls", lambda self, path, detail: [])
    found = stored.check("memory://doctor/run")
    assert found.failed == "compare"
    assert "does not list" in found.error


@pytest.mark.servers
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_real_servers(kind, tmp_path, monkeypatch):
    with servers.KINDS[kind](tmp_path / "server") as server:
        monkeypatch.setitem(fsspec.config.conf, server.kind, server.options)
        found = stored.check(f"{server.url}/doctor/run")
        assert found.error == ""
        assert list(found.seconds) == list(stored.STEPS)
        fs, folder = storage.resolve(f"{server.url}/doctor")
        assert [path for path in fs.find(folder) if storage.PREFLIGHT in path] == []
        found = stored.check(f"{server.url}-not-there/run")
        assert found.failed == "write"
        assert "There is no such bucket" in found.error
