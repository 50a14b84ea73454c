"""A wait that is too long: who speaks, what is said and written, and what does not trip it."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from orchestrator import agreement, deadline, storage, waits
from orchestrator.communicators.watched import WatchedCommunicator
from orchestrator.deadline import Deadline
from orchestrator.faults import Faults, set_aside
from orchestrator.waits import Wait, Waits
from tests.fakes import FakeCommunicator, Recorder

# A thread that ends where the process would end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_wait_is_on_record_while_it_lasts():
    clock = Clock()
    record = Waits(10.0, clock)
    assert record.current is None
    clock.now = 101.0
    with record.on("allreduce"):
        assert record.current == Wait("allreduce", 101.0, 30.0), "three times until the first step"
        clock.now = 105.0
    assert record.current is None
    assert (record.last, record.moved) == ("allreduce", 105.0)
    record.stepped(4)
    with record.on("a training step"):
        assert record.current == Wait("a training step", 105.0, 10.0)
        with record.on("broadcast"):
            assert record.current == Wait("broadcast", 105.0, 10.0)
        assert record.current == Wait("a training step", 105.0, 10.0)
    with record.on("the first training step", first=True):
        assert record.current is not None
        assert record.current.limit == 30.0
    assert record.step == 4


@pytest.mark.parametrize(("timeout", "limit"), [(10.0, 900.0), (600.0, 1800.0)])
def test_what_rank_0_does_for_all_takes_longer(timeout, limit):
    seen = []
    record = Waits(timeout)
    record.stepped(1)

    class Root(FakeCommunicator):
        def broadcast_object(self, obj, root=0):
            seen.append(record.current)
            return None, None

    communicator = WatchedCommunicator(Root(1, 2), record)
    agreement.on_root(communicator, lambda: None)
    communicator.broadcast_object(0)
    assert [wait.limit for wait in seen] == [limit, timeout]


def test_every_collective_is_noted():
    record = Waits(10.0)
    seen = []

    def note(value):
        assert record.current is not None
        seen.append(record.current.call)
        return value

    inner = FakeCommunicator(1, 2, reduce=note, broadcast=note, gather=lambda obj: [note(obj)])
    inner.barrier = lambda: note(None)
    communicator = WatchedCommunicator(inner, record)
    communicator.allreduce(np.zeros(1))
    communicator.broadcast(np.zeros(1))
    communicator.broadcast_object(1)
    communicator.allgather_object(1)
    communicator.barrier()
    assert seen == ["allreduce", "broadcast", "broadcast_object", "allgather_object", "barrier"]
    assert record.current is None
    assert waits.of(communicator) is record
    assert waits.of(inner) is None
    place = (communicator.name, communicator.rank, communicator.size)
    assert place == ("fake", 1, 2)


def test_a_wait_ends_with_an_error_too():
    def fail(value):
        raise OSError("gone")

    record = Waits(10.0)
    communicator = WatchedCommunicator(FakeCommunicator(reduce=fail), record)
    with pytest.raises(OSError, match="gone"):
        communicator.allreduce(np.zeros(1))
    assert record.current is None


@pytest.fixture
def quick(monkeypatch):
    """Deadlines that look often; returns how often each thread ended the process."""
    ended: list[str] = []
    done = threading.Event()

    def end(code):
        ended.append(f"{threading.current_thread().name}: {code}")
        done.set()
        raise SystemExit

    monkeypatch.setattr(deadline.os, "_exit", end)
    monkeypatch.setattr(deadline, "_LOCAL_SECONDS", 0.05)
    monkeypatch.setattr(deadline, "_LAST_SECONDS", 1e6)
    return ended, done


def watched(rank: int, size: int, folder, timeout: float) -> Deadline:
    one = Deadline(Waits(timeout), f"rank {rank}")
    one.faults = Faults(FakeCommunicator(rank, size), "test")
    one.faults.record_in(str(folder))
    one._thread.name = f"rank {rank}"
    return one


def test_all_that_can_say_where_they_stand(quick, tmp_path, capfd):
    """Of three ranks one waits, one is in its own code, and one does not run."""
    ended, done = quick
    waiting, working = watched(0, 3, tmp_path, 0.4), watched(1, 3, tmp_path, 0.4)
    recorder = Recorder()
    assert waiting.faults is not None
    waiting.faults.events = recorder
    waiting.waits.step = 6
    waiting.waits.stepped(1)
    working.start()
    waiting.start()
    with waiting.waits.on("allreduce"):
        assert done.wait(20)
    waiting._thread.join(5)
    working._thread.join(10)
    assert sorted(ended) == ["rank 0: 70", "rank 1: 70"]
    said = capfd.readouterr().err
    assert "rank 0 (" in said
    assert "): after step 7, waiting in allreduce for " in said
    assert "): before training, not waiting for other ranks: in its own code for" in said
    assert "rank 2: did not speak: stopped, hung or dead, or on a host that" not in said
    assert "\n  rank 2: did not speak: stopped, hung or dead\n" in said
    assert "run.timeout=0.4 s" in said
    assert said.count("all ranks end.") == 1
    note = (tmp_path / "faults/rank-1.txt").read_text()
    assert "not waiting" in note.splitlines()[0]
    assert "test_deadline.py" in note, "the Python stacks"
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (70, 7)
    assert "rank 2: did not speak" in outcome["reason"]
    assert recorder.kinds() == ["fault"]
    assert recorder.events[0]["reason"] == outcome["reason"]


def test_before_all_are_there_a_rank_speaks_alone(quick, capfd):
    _, done = quick
    one = Deadline(Waits(0.1), "rank 3 of 4")
    one.start()
    with one.waits.on("start-up, for all ranks to be there"):
        assert done.wait(10)
    assert "rank 3 of 4: before training, waiting in start-up, for all" in capfd.readouterr().err


def watched_by(clock: Clock, ticks, timeout: float, folder) -> None:
    """Watches in this thread, as the clock of `ticks(waits)` goes: one look at each `yield`."""
    one = watched(0, 2, folder, timeout)
    one.waits = Waits(timeout, clock)
    one.waits.stepped(1)
    going = ticks(one.waits)
    one._stop = cast(Any, SimpleNamespace(wait=lambda seconds: next(going, True)))
    one._watch()


def test_no_time_but_in_waits_counts(quick, tmp_path):
    """Five waits of 4 s, and 12 s after each, where a wait may last 10."""
    ended, _ = quick
    clock = Clock()

    def ticks(record):
        for _ in range(5):
            with record.on("allreduce"):
                clock.now += 4
                yield False
            for _ in range(3):
                clock.now += 4
                yield False

    watched_by(clock, ticks, 10.0, tmp_path)
    assert ended == []
    assert not (tmp_path / "faults").exists()


def test_a_process_that_was_stopped_counts_anew(quick, tmp_path, capfd):
    """SIGSTOP, or a machine that slept: the others did not keep it waiting."""
    ended, _ = quick
    clock = Clock()

    def ticks(record):
        with record.on("allreduce"):
            clock.now += 1000
            yield False
            for seconds in (4, 4, 4, 4, 4, 4, 4, 2, 1):  # and now it runs
                clock.now += seconds
                yield False

    with pytest.raises(SystemExit):
        watched_by(clock, ticks, 30.0, tmp_path)
    assert len(ended) == 1
    assert "waiting in allreduce for 1031.0 s (at most 30 s)" in capfd.readouterr().err


def test_notes_anywhere(capfd):
    """A run directory that is no folder: notes are put there, and found."""
    one, two = (Faults(FakeCommunicator(rank, 2), "elsewhere") for rank in (0, 1))
    for faults in (one, two):
        faults.record_in("memory://runs/faulty")
    try:
        set_aside("memory://runs/faulty")
        assert not one.others_noted()
        two.note("rank 1 is here")
        assert one.others_noted()
        assert not two.others_noted()
        assert one.noted() == {1: "rank 1 is here"}
        two.deadline(70, "late", 3)
        fs, path = storage.resolve("memory://runs/faulty/outcome.json")
        assert json.loads(fs.cat_file(path))["reason"] == "late"
        set_aside("memory://runs/faulty")
        assert one.noted() == {}
        assert len(fs.glob("/runs/faulty/faults-before-*/rank-1.txt")) == 1, "still there"
    finally:
        storage.resolve("memory://runs")[0].rm("/runs", recursive=True)
