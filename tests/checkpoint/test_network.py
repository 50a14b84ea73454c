"""Object stores behind a network that fails, users' mistakes, and several writers at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator import storage
from orchestrator.checkpoint import manifest, objects, saving
from orchestrator.checkpoint.saving import ConflictError
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError
from orchestrator.retries import Retry
from tests.checkpoint.proxy import Fault
from tests.checkpoint.targets import QUICK, content, files
from tests.checkpoint.victim import PART

pytestmark = pytest.mark.servers
S3_ONLY = pytest.mark.parametrize("remote", ["s3", "moto"], indirect=True)
SEAWEEDFS_ONLY = pytest.mark.parametrize("remote", ["s3"], indirect=True)
GCS_ONLY = pytest.mark.parametrize("remote", ["gcs"], indirect=True)
LARGE = 2 * PART + 12345  # three parts


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(objects, "PART", PART)


def chunks(store: CheckpointStore) -> list[str]:
    """Filled with the ranges of bytes that go by GCS's resumable uploads from here on."""
    seen: list[str] = []
    fs = store._catalog.place.fs  # pyright: ignore[reportAttributeAccessIssue] - it is remote
    real = fs._request

    async def request(method: str, path: str, *args, **named):
        if "upload_id=" in path and method == "POST":
            seen.append(named["headers"]["Content-Range"])
        return await real(method, path, *args, **named)

    fs._request = request
    return seen


def test_no_such_bucket_is_known_at_the_start(remote):
    url = remote.url.replace("runs/", "no-such-bucket/")
    begin = time.monotonic()
    with pytest.raises(SettingError, match=r"no-such-bucket.*There is no such bucket: make it"):
        CheckpointStore(url, **remote.options).preflight()
    store = CheckpointStore(url, spool=str(remote.spool), **remote.options)
    for size in (3000, LARGE):
        with pytest.raises(SettingError, match="There is no such bucket"):
            store.save(files(1, size), step=1)
    assert time.monotonic() - begin < 10


@SEAWEEDFS_ONLY
@pytest.mark.parametrize("wrong", [{"key": "reader"}, {"key": "nobody"}, {"secret": "guessed"}])
def test_no_permission_is_known_at_the_start(remote, wrong):
    store = remote.store(**wrong)
    begin = time.monotonic()
    with pytest.raises(SettingError, match="Check the credentials, and what they may do there"):
        store.preflight()
    with pytest.raises(SettingError, match="Check the credentials"):
        store.save(files(1), step=1)
    assert time.monotonic() - begin < 10
    assert remote.paths() == []


@GCS_ONLY
@pytest.mark.parametrize(
    ("fault", "size"),
    [
        (Fault("denied"), 3000),
        (Fault("denied", status=401), 3000),
        (Fault("denied", method=b"POST"), 3000),
        (Fault("denied", method=b"POST"), LARGE),
        (Fault("denied", method=b"POST", skip=2), LARGE),
    ],
    ids=["nothing", "nobody", "read", "read, large", "withdrawn between two chunks"],
)
def test_gcs_denies_at_once(remote, fault, size, caplog):
    """fake-gcs-server has no permissions: the proxy answers for it."""
    store = CheckpointStore(remote.url, spool=str(remote.spool), **remote.options)
    words = (
        r"storage\.objects\.create access(.|\n)*Check the credentials, and what they may do there"
    )
    begin = time.monotonic()
    remote.fault(fault)
    with pytest.raises(SettingError, match=words):
        store.save(files(1, size), step=1)
    assert remote.hits == 1
    if fault.skip == 0:
        remote.fault(fault)
        with pytest.raises(SettingError, match=words):
            store.preflight()
        assert remote.hits == 1
    assert time.monotonic() - begin < 5
    assert "follows in" not in caplog.text
    remote.fault(Fault())
    assert remote.leftovers() == []


@GCS_ONLY
@pytest.mark.parametrize(
    "fault",
    [
        Fault("deaf", method=b"POST", skip=3, times=1),
        Fault("denied", method=b"POST", skip=2, times=1, status=410),
    ],
    ids=["the last answer is lost", "gone"],
)
def test_a_resumable_upload_whose_session_is_over_is_begun_anew(remote, fault):
    store = remote.store()
    seen = chunks(store)
    remote.fault(fault)
    store.save(files(1, LARGE), step=1)
    assert remote.hits == 1
    first = f"bytes 0-{PART - 1}/{LARGE}"
    last = f"bytes {2 * PART}-{LARGE - 1}/{LARGE}"
    assert seen.count(first) == 2
    assert seen[-3:] == [first, f"bytes {PART}-{2 * PART - 1}/{LARGE}", last]
    assert [verdict.problem for verdict in store.verify()] == [None]
    assert remote.leftovers() == []


@GCS_ONLY
def test_sessions_that_are_always_over_are_no_missing_bucket(remote):
    remote.fault(Fault("denied", method=b"POST", skip=1, status=404))
    with pytest.raises(FileNotFoundError, match="upload_id="):
        remote.store(Retry(budget=0)).save(files(1, LARGE), step=1)
    assert remote.hits == 1


@SEAWEEDFS_ONLY
def test_nobody_there(remote, caplog):
    """The budget ends it; the tries are logged. (gcsfs's own tries before ours take long.)"""
    remote.fault(Fault("refuse"))
    store = remote.store(Retry(budget=1, first=0.1, cap=0.2))
    with pytest.raises(Exception, match=f"127.0.0.1:{remote.server.proxy.port}"):
        store.preflight()
    assert remote.hits >= 3
    assert "try 3 follows in" in caplog.text
    assert "failed 3 times in" in caplog.text


@SEAWEEDFS_ONLY
def test_a_passing_storm_is_not_seen(remote):
    store = remote.store()
    made = store.save(files(1), step=1)
    remote.fault(Fault("unavailable", times=4))
    assert store.latest() == made
    assert remote.hits == 4


def test_the_answer_to_the_commit_is_lost(remote, monkeypatch):
    """The put arrived and its retry is refused: the token tells that it was ours."""
    store = remote.store()
    place = store._catalog.place
    real = place.commit

    def commit(folder: str, token: str, data: bytes) -> None:
        remote.fault(Fault("deaf", times=1))
        real(folder, token, data)

    monkeypatch.setattr(place, "commit", commit)
    made = store.save(files(1), step=1)
    assert remote.hits == 1
    assert made.manifest.token == remote.manifest_of(1).token
    assert [verdict.problem for verdict in store.verify()] == [None]
    assert remote.leftovers() == []


def test_a_commit_of_unknown_end_leaves_the_files(remote, monkeypatch):
    """Whoever comes next finds either a whole checkpoint or leftovers, never a torn one."""
    store = remote.store(Retry(budget=0))
    real = store._catalog.place.commit

    def commit(folder: str, token: str, data: bytes) -> None:
        real(folder, token, data)
        raise ConnectionResetError("the answer is lost")

    monkeypatch.setattr(store._catalog.place, "commit", commit)
    with pytest.raises(ConnectionResetError):
        store.save(files(1), step=1)
    assert [verdict.problem for verdict in remote.store().verify()] == [None]
    again = remote.store().save(files(1), step=1)
    assert again.manifest.token == remote.manifest_of(1).token


def test_eight_writers_and_one_winner(remote, monkeypatch):
    """The store's conditional put lets one commit; the others are told, and nothing is mixed."""
    tokens = []

    def commit(n: int) -> bool:
        place = remote.store()._catalog.place
        made = manifest.Manifest(step=1, token=f"{n:016x}", files=())
        try:
            place.commit(manifest.folder(1), made.token, made.encode())
        except FileExistsError:
            return False
        tokens.append(made.token)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(commit, range(8))) == 1
    assert [remote.manifest_of(1).token] == tokens
    monkeypatch.setattr(saving, "_PROCESS", "another")
    with pytest.raises(ConflictError):
        remote.store().save({"x": content(b"x")}, step=1)


@S3_ONLY
def test_unfinished_multipart_uploads_are_aborted_when_old(remote):
    store = remote.store()
    store.save(files(1), step=1)
    bucket, _, prefix = remote.root.partition("/")
    for key in (f"{prefix}/step-0000000002/0123456789abcdef/x", f"{prefix}-other/x"):
        remote.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert len(remote.uploads()) == 2
    if remote.kind != "moto":  # to which each began in 2010
        assert store.prune().leftovers == ()
    assert len(store.prune(older_than=-60).leftovers) == 1
    assert [key.startswith(f"{prefix}-other") for key in remote.uploads()] == [True]


@pytest.mark.parametrize(
    ("remote", "fault", "data"),
    [
        ("s3", Fault("unavailable", times=4), b"whole"),
        ("gcs", Fault("deaf", method=b"POST", skip=1, times=1), b"resumable" * 2**20),
    ],
    indirect=["remote"],
    ids=["s3: storm", "gcs: the last answer is lost"],
)
def test_replace_survives(remote, fault, data, monkeypatch):
    url = f"{remote.url}/best.keras"
    resolve = storage.resolve
    monkeypatch.setattr(storage, "resolve", lambda name, _=None: resolve(name, remote.options))
    remote.fault(fault)
    storage.replace(url, content(data), QUICK)
    assert remote.hits == fault.times
    assert remote.read("best.keras") == data


@SEAWEEDFS_ONLY
def test_a_server_that_alters_what_it_keeps_is_found_out(remote, monkeypatch):
    store = remote.store()
    fs = remote.fs
    monkeypatch.setattr(fs, "cat_file", lambda path, **_: b"something else")
    with pytest.raises(OSError, match="gave back other bytes"):
        store.preflight()
    monkeypatch.undo()
    assert remote.paths() == []
