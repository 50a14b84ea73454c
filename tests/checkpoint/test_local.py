"""What a local disk gives beyond the rule: fsync of all that counts, no copy, no replacing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import subprocess
import time

import pytest

from orchestrator.checkpoint.local import LocalPlace
from orchestrator.checkpoint.retention import Last
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError
from tests.checkpoint.targets import expected, files
from tests.disks import NotHereError, small_disk


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """The system calls that matter, in order, with the paths below the store."""
    seen: list[str] = []

    def short(path: str) -> str:
        parts = os.path.relpath(path, tmp_path).split(os.sep)
        return "/".join("TOKEN" if re.fullmatch("[0-9a-f]{16}", part) else part for part in parts)

    def spy(name: str, describe) -> None:
        real = getattr(os, name)

        def called(*arguments, **named):
            seen.append(describe(*arguments))
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, called)

    def synced(descriptor: int) -> str:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        return f"fsync {kind} {short(path)}"

    spy("fsync", synced)
    spy("link", lambda source, target: f"link {short(source)} {short(target)}")
    spy("unlink", lambda path: f"unlink {short(path)}")
    return seen


HOME = "store/step-0000000001"


def test_all_is_on_the_disk_before_the_manifest_has_its_name(tmp_path, steps):
    CheckpointStore(tmp_path / "store").save(files(1), step=1)
    link = f"link {HOME}/TOKEN/.manifest {HOME}/manifest.json"
    before, after = steps[: steps.index(link)], steps[steps.index(link) + 1 :]
    assert set(before) == {
        *(f"fsync file {HOME}/TOKEN/{name}" for name in expected(1)),
        f"fsync folder {HOME}/TOKEN",
        f"fsync folder {HOME}",
        "fsync folder store",
        "fsync folder .",
        f"fsync file {HOME}/TOKEN/.manifest",
    }
    assert before[-1] == f"fsync file {HOME}/TOKEN/.manifest"
    assert after == [f"fsync folder {HOME}", f"unlink {HOME}/TOKEN/.manifest"]


def test_deletion_takes_the_manifest_first_and_for_good(tmp_path, steps):
    store = CheckpointStore(tmp_path / "store")
    store.save(files(1), step=1)
    store.save(files(2), step=2)
    steps.clear()
    assert store.prune([Last(1)]).steps == (1,)
    assert steps[:2] == [f"unlink {HOME}/manifest.json", f"fsync folder {HOME}"]
    assert sorted(steps[2:4]) == [f"unlink {HOME}/TOKEN/{name}" for name in sorted(expected(1))]


def test_files_are_written_and_read_where_they_lie(tmp_path):
    store, seen = CheckpointStore(tmp_path / "store"), []

    def write(path: str) -> None:
        seen.append(path)
        with open(path, "wb") as file:
            file.write(b"x")

    made = store.save({"x": write}, step=1)
    with store.fetch(made) as folder:
        assert [os.path.join(folder, "x")] == seen
    assert seen[0].startswith(f"{tmp_path}/store/step-0000000001/{made.manifest.token}/")


def test_without_links_a_rename_commits(tmp_path, monkeypatch):
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = CheckpointStore(tmp_path / "store")
    made = store.save(files(1), step=1)
    assert store.latest() == made
    place = store._catalog.place
    os.makedirs(tmp_path / "store/step-0000000001/fedcba9876543210")
    with pytest.raises(FileExistsError):
        place.commit("step-0000000001", "fedcba9876543210", b"{}")
    assert store.latest() == made


def test_a_failed_fsync_commits_nothing(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "store")
    store.save(files(1), step=1)
    real = os.fsync

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="bad disk"):
        store.save(files(2), step=2)
    monkeypatch.setattr(os, "fsync", real)
    with store.newest() as newest:
        assert newest is not None
        assert newest.checkpoint.step == 1
    store.prune(older_than=-60)
    assert os.listdir(tmp_path / "store") == ["step-0000000001"]


def test_an_empty_folder_of_a_dead_writer_is_removed_when_old(tmp_path):
    store = CheckpointStore(tmp_path / "store")
    store.save(files(1), step=1)
    os.makedirs(tmp_path / "store/step-0000000002/fedcba9876543210")
    os.makedirs(tmp_path / "store/not-ours")
    assert store.prune().leftovers == ()
    assert len(store.prune(older_than=-60).leftovers) == 2
    assert sorted(os.listdir(tmp_path / "store")) == ["not-ours", "step-0000000001"]


def test_a_place_of_its_own_lists_nothing_where_nothing_is(tmp_path):
    assert LocalPlace(str(tmp_path / "nowhere")).tree() == {}


@pytest.fixture
def disk(tmp_path):
    """A folder with a mount of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(small_disk(folder, 2**20))
        except NotHereError as reason:
            pytest.skip(str(reason))
        yield folder


def remount(folder, how: str) -> None:
    """Makes a mount read-only (`ro`) or writable again (`rw`)."""
    command = ["mount", "-o", f"remount,{how}", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=10)


READ_ONLY = r"Read-only file system.*Nothing can be written there; choose another place"


def below(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_read_only_disk_is_known_at_once_and_can_be_read(disk):
    store = CheckpointStore(disk / "store")
    store.save(files(1), step=1)
    store.save(files(2), step=2)
    before = below(disk)
    remount(disk, "ro")
    begin = time.monotonic()
    for url in (disk / "store", disk / "new" / "store"):
        with pytest.raises(SettingError, match=READ_ONLY):
            CheckpointStore(url).preflight()
        with pytest.raises(SettingError, match=READ_ONLY):
            CheckpointStore(url).save(files(3), step=3)
    with pytest.raises(SettingError, match=READ_ONLY):
        store.prune([Last(1)])
    assert time.monotonic() - begin < 5, "nothing was tried again"
    assert below(disk) == before
    assert [verdict.problem for verdict in store.verify()] == [None, None]
    with CheckpointStore(disk / "store").newest() as newest:
        assert newest is not None
        assert newest.checkpoint.step == 2


def test_a_disk_that_turns_read_only_in_a_save(disk):
    """As ext4 does on an error: what was there stays whole, and the half is gone once it can be."""
    store = CheckpointStore(disk / "store")
    store.save(files(1), step=1)
    before = below(disk)

    def turn(path: str) -> None:
        remount(disk, "ro")
        with open(path, "wb"):
            pass

    with pytest.raises(SettingError, match=READ_ONLY):
        store.save({**files(2), "z": turn}, step=2)
    with store.newest() as newest:
        assert newest is not None
        assert newest.checkpoint.step == 1
    remount(disk, "rw")
    assert len(store.prune(older_than=-60).leftovers) == len(files(2))
    assert below(disk) == before


def test_a_read_only_spool_is_known_at_once(disk):
    remount(disk, "ro")
    for spool in (disk, disk / "new"):
        store = CheckpointStore("memory://read-only-spool", spool=str(spool))
        with pytest.raises(SettingError, match=READ_ONLY):
            store.save(files(1), step=1)
        assert list(store.verify()) == []
