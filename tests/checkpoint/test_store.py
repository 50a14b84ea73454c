"""What a store does, the same on a disk, in memory, on two S3 servers and on GCS."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from orchestrator.checkpoint import saving
from orchestrator.checkpoint.local import BrokenCheckpointError
from orchestrator.checkpoint.manifest import InvalidManifestError
from orchestrator.checkpoint.retention import Best, Last, Multiples
from orchestrator.checkpoint.saving import ConflictError
from orchestrator.checkpoint.store import DAY
from tests.checkpoint.targets import content, expected, files


def loaded(folder: str) -> dict[str, bytes]:
    found = {}
    for below, _, names in os.walk(folder):
        for name in names:
            path = Path(below, name)
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def saved(target, *steps: int, **more):
    store = target.store()
    for step in steps:
        store.save(files(step), step=step, **more)
    return store


@pytest.fixture
def another_run(monkeypatch):
    """What is saved from here on is another process's."""

    def change() -> None:
        monkeypatch.setattr(saving, "_PROCESS", os.urandom(4).hex())

    return change


def test_an_empty_store(target):
    store = target.store()
    assert store.latest() is None
    assert store.best("loss") is None
    assert list(store.list()) == []
    assert list(store.verify()) == []
    with store.newest() as newest:
        assert newest is None
    pruned = store.prune(older_than=0)
    assert (pruned.steps, pruned.leftovers) == ((), ())


def test_what_is_saved_is_found_and_fetched(target):
    made = target.store().save(
        files(7), step=7, epoch=2, metrics={"loss": 0.5, "top": 1}, world_size=4
    )
    store = target.store()
    found = store.latest()
    assert found == made
    assert (found.step, found.epoch, found.metrics) == (7, 2, {"loss": 0.5, "top": 1.0})
    assert found.url == f"{target.url}/step-0000000007"
    assert found.manifest.world_size == 4
    assert found.manifest.libraries["keras"].startswith("3.")
    with store.fetch(found) as folder:
        assert loaded(folder) == expected(7)
    if target.kind != "local":
        assert not os.path.exists(folder)
    assert os.listdir(target.spool) == []


def test_the_layout(target):
    """Data files under the attempt's token, the manifest beside it, and nothing else."""
    made = saved(target, 100).latest()
    token = made.manifest.token
    assert target.paths() == [
        *sorted(f"step-0000000100/{token}/{name}" for name in expected(100)),
        "step-0000000100/manifest.json",
    ]
    record = json.loads(target.read("step-0000000100/manifest.json"))
    for file in record["files"]:
        data = target.read(f"step-0000000100/{token}/{file['name']}")
        assert file["size"] == len(data)
        assert file["sha256"] == hashlib.sha256(data).hexdigest()


def test_files_in_folders_and_empty_ones(target):
    data = {"a/b/c.bin": b"deep", "empty": b""}
    store = target.store()
    made = store.save({name: content(one) for name, one in data.items()}, step=1)
    assert [verdict.problem for verdict in store.verify()] == [None]
    with store.fetch(made) as folder:
        assert loaded(folder) == data


def test_a_large_file_goes_in_parts(target):
    data = os.urandom(2**20) * 40
    store = target.store()
    made = store.save({"large": content(data)}, step=1)
    assert made.manifest.files[0].sha256 == hashlib.sha256(data).hexdigest()
    assert [verdict.problem for verdict in store.verify()] == [None]
    with store.fetch(made) as folder:
        assert Path(folder, "large").read_bytes() == data
    assert target.uploads() == []


def test_a_writer_may_hash_by_itself(target):
    def write(path: str) -> str:
        Path(path).write_bytes(b"abc")
        return hashlib.sha256(b"abc").hexdigest()

    def wrong(path: str) -> str:
        Path(path).write_bytes(b"abd")
        return hashlib.sha256(b"abc").hexdigest()

    store = target.store()
    store.save({"x": write}, step=1)
    store.save({"x": wrong}, step=2)  # what was to be written is not what is there
    assert [v.problem for v in store.verify()] == [
        None,
        "x has other content than was saved (SHA-256)",
    ]


def test_list_and_best(target):
    store = target.store()
    losses = {1: 0.5, 2: 0.2, 3: math.nan, 4: 0.2}
    for step, loss in losses.items():
        store.save(files(step), step=step, metrics={"loss": loss})
    store.save(files(5), step=5)
    assert [one.step for one in store.list()] == [1, 2, 3, 4, 5]
    assert store.best("loss").step == 2
    assert store.best("loss", "max").step == 1
    assert store.best("accuracy") is None
    target.remove(target.data_path(2))
    assert store.best("loss").step == 4


def test_a_failed_writer_leaves_nothing(target):
    store = saved(target, 1)
    before = target.paths()

    def fail(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.save({**files(2), "z": fail}, step=2)
    with pytest.raises(ValueError, match=r"files\['z'\] wrote no file"):
        store.save({**files(2), "z": lambda path: None}, step=2)
    assert target.paths() == before
    assert target.leftovers() == []
    assert store.latest().step == 1


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        ("truncated", "model.weights.h5 has 2999 bytes instead of 3000"),
        ("flipped", "model.weights.h5 has other content than was saved (SHA-256)"),
        ("missing", "model.weights.h5 is missing"),
        ("no manifest", "there is no manifest: the save was not finished"),
        ("torn manifest", "the manifest is not JSON"),
        ("altered manifest", "the manifest was altered"),
        ("manifest of another step", "the manifest is that of step 1, not of 2"),
        ("manifest of another run", "model.weights.h5 is missing"),
    ],
)
def test_a_broken_one_is_passed_over_and_named(target, harm, problem, tmp_path):
    saved(target, 1, 2)
    hurt(target, harm, tmp_path)
    store = target.store()
    reports = []
    with store.newest(lambda *report: reports.append(report)) as newest:
        assert newest.checkpoint.step == 1
        assert loaded(newest.folder) == expected(1)
    assert [step for step, _ in reports] == [2]
    assert reports[0][1].startswith(problem)
    verdicts = store.verify()
    assert [v.step for v in verdicts] == [1, 2]
    assert verdicts[0].problem is None
    assert verdicts[1].problem.startswith(problem)
    if harm != "flipped":  # which only reading all of it can tell
        assert store.latest().step == 1
    # The step can be saved again, and is whole then.
    store.save(files(2), step=2)
    assert [v.problem for v in target.store().verify()] == [None, None]


def hurt(target, harm: str, tmp_path) -> None:
    path, name = target.data_path(2), "step-0000000002/manifest.json"
    data, record = target.read(path), target.read(name)
    if harm == "truncated":
        target.put(path, data[:-1])
    elif harm == "flipped":
        target.put(path, bytes([data[0] ^ 1]) + data[1:])
    elif harm == "missing":
        target.remove(path)
    elif harm == "no manifest":
        target.remove(name)
    elif harm == "torn manifest":
        target.put(name, record[: len(record) // 2])
    elif harm == "altered manifest":
        target.put(name, record.replace(b'"world_size": 1', b'"world_size": 2'))
    elif harm == "manifest of another step":
        target.put(name, target.read("step-0000000001/manifest.json"))
    else:
        from tests.checkpoint.targets import LocalTarget

        other = LocalTarget(tmp_path / "other")
        saved(other, 2)
        target.put(name, other.read(name))


def test_fetch_of_a_broken_one(target):
    store = saved(target, 1)
    found = store.latest()
    target.put(target.data_path(1), b"other")
    with pytest.raises(BrokenCheckpointError, match="5 bytes instead of 3000"), store.fetch(found):
        pass
    assert os.listdir(target.spool) == []


def test_nothing_whole_is_none_and_said(target):
    saved(target, 1, 2)
    for step in (1, 2):
        target.remove(target.data_path(step))
    reports = []
    with target.store().newest(lambda *report: reports.append(report)) as newest:
        assert newest is None
    assert [step for step, _ in reports] == [2, 1]


def test_saving_a_step_again(target, another_run):
    """One's own and equal ones are given back, another run's are refused."""
    store = target.store()
    first = store.save(files(1), step=1)
    assert store.save({"other": content(b"x")}, step=1) == first
    another_run()
    assert target.store().save(files(1), step=1) == first
    with pytest.raises(ConflictError, match=r"committed step 1 on .* folder of its own"):
        target.store().save({"other": content(b"x")}, step=1)
    assert target.leftovers() == []
    assert [v.problem for v in store.verify()] == [None]


def test_two_runs_at_one_url(target, another_run, monkeypatch):
    """Each of two runs whose steps never meet is told of the other; nothing is mixed."""
    us = saving._PROCESS
    ours = saved(target, 10)
    another_run()
    theirs = target.store()
    theirs.save(files(15), step=15)
    theirs.save(files(25), step=25)
    monkeypatch.setattr(saving, "_PROCESS", us)
    with pytest.raises(ConflictError, match=r"committed step 15 .* was not there before"):
        ours.save(files(20), step=20)
    assert [one.step for one in target.store().list()] == [10, 15, 25]
    assert target.leftovers() == []


def test_two_stores_of_one_run(target):
    one, two = saved(target, 1), target.store()
    two.save(files(2), step=2)
    one.save(files(3), step=3)
    two.save(files(4), step=4)
    assert [found.step for found in one.list()] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", ".x"])
def test_a_wrong_name_is_refused_before_anything_is_written(target, name):
    with pytest.raises(ValueError, match="no name for a checkpoint's file"):
        target.store().save({name: content(b"x")}, step=1)
    with pytest.raises(ValueError, match="at least one file"):
        target.store().save({}, step=1)
    with pytest.raises(ValueError, match="step=-1"):
        target.store().save(files(1), step=-1)
    assert target.paths() == []


def test_prune_keeps_what_policies_keep(target):
    store = target.store()
    for step, loss in {10: 0.5, 20: 0.1, 30: 0.4, 40: 0.3, 50: 0.2, 60: 0.6}.items():
        store.save(files(step), step=step, metrics={"loss": loss})
    assert store.prune().steps == ()
    pruned = store.prune([Best("loss"), Last(2), Multiples(30)])
    assert pruned.steps == (10, 40)
    assert [one.step for one in store.list()] == [20, 30, 50, 60]
    assert store.prune([Best("accuracy", "max")]).steps == (20, 30, 50)
    assert target.leftovers() == []
    assert [v.problem for v in store.verify()] == [None]


def test_prune_never_takes_the_newest_whole_one(target):
    store = saved(target, 1, 2, 3)
    target.remove(target.data_path(3))
    assert store.prune([Last(1)]).steps == (1,)
    assert store.latest().step == 2


def test_remove(target):
    store = saved(target, 1, 2)
    store.remove(store.latest())
    assert [one.step for one in store.list()] == [1]
    assert target.leftovers() == []


def test_prune_removes_what_the_dead_left_when_it_is_old(target):
    saved(target, 1, 2, 3)
    target.remove("step-0000000002/manifest.json")
    target.put("step-0000000003/manifest.json", b"{}")
    target.put("step-0000000001/0123456789abcdef/model.weights.h5", b"an older attempt's")
    target.put("step-0000000009/0123456789abcdef/model.weights.h5", b"died early")
    target.put(".preflight-0123456789abcdef", b"x")
    target.put("notes.txt", b"not ours")
    now = [0.0]
    store = target.store(clock=lambda: now[0])
    import time

    now[0] = time.time() + DAY - 60
    assert store.prune().leftovers == ()
    now[0] = time.time() + DAY + 60
    leftovers = store.prune().leftovers
    assert sum(path.endswith("model.weights.h5") for path in leftovers) == 4
    assert set(target.paths()) == {
        "notes.txt",
        target.data_path(1),
        target.data_path(1, "state.json"),
        "step-0000000001/manifest.json",
    }
    target.remove("notes.txt")
    assert target.leftovers() == []


def test_prune_leaves_a_newer_versions_checkpoints_alone(target):
    saved(target, 1, 2)
    record = json.loads(target.read("step-0000000002/manifest.json"))
    target.put("step-0000000002/manifest.json", json.dumps({**record, "format": 2}).encode())
    before = target.paths()
    store = target.store()
    assert store.prune([Last(1)], older_than=-60).leftovers == ()
    assert target.paths() == before
    assert "update keras-orchestrator" in store.verify()[1].problem
    with pytest.raises(ConflictError, match="update keras-orchestrator"):
        store.save(files(2), step=2)


def test_a_manifest_cannot_name_a_file_elsewhere(target):
    saved(target, 1)
    record = target.read("step-0000000001/manifest.json")
    target.put(
        "step-0000000001/manifest.json",
        record.replace(b'"model.weights.h5"', b'"../../../../etc/passwd"'),
    )
    with target.store().newest() as newest:
        assert newest is None
    with pytest.raises(InvalidManifestError):
        target.manifest_of(1)


def test_preflight_leaves_nothing(target):
    store = target.store()
    store.preflight()
    assert target.paths() == []
