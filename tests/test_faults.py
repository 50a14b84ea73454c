"""How a rank fails: the first says why, in full; the others say in a line that they follow."""

from __future__ import annotations

import functools
import json
from typing import Any, cast

import pytest

from orchestrator import faults as module
from orchestrator.agreement import EarlyExitError, RankError, on_all
from orchestrator.communicators.horovod import HorovodCommunicator
from orchestrator.config import SettingError
from orchestrator.faults import Faults
from tests.fakes import FakeCommunicator


class Ended(Exception):
    """Instead of the end of the process."""


class Rank(FakeCommunicator):
    def lost(self, error):
        return "gone" in str(error)

    def abort(self, code):
        raise Ended(code)


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_HEAR_SECONDS", 0.0)
    monkeypatch.setattr(module, "_HOLD_SECONDS", 0.0)
    monkeypatch.setattr(module, "ignore_signals", lambda: None)
    found = [Faults(Rank(rank, 3), "test") for rank in range(3)]
    for one in found:
        one.record_in(str(tmp_path))
    return found


def fail(faults: Faults, error: Exception, capfd) -> str:
    with pytest.raises(Ended):
        faults.fail(error)
    return capfd.readouterr().err


def test_the_first_in_full_and_the_others_in_a_line(ranks, capfd):
    first = fail(ranks[1], OSError("no space left"), capfd)
    assert first.startswith("OSError: no space left\nrank 1 (")
    also = fail(ranks[2], OSError("no space here either"), capfd)
    assert also.count("\n") == 1
    assert "failed as well: OSError: no space here either" in also
    for error in (RuntimeError("peer gone"), RankError("Rank 1 failed: no space left")):
        line = fail(ranks[0], error, capfd)
        assert line.count("\n") == 1
        assert "ended since another rank did: rank 1 (" in line
        assert "OSError: no space left" in line


def test_a_rank_that_died_without_a_word(ranks, capfd):
    line = fail(ranks[0], RuntimeError("peer gone"), capfd)
    assert "lost another rank, which ended without a word: killed, or crashed" in line
    assert ranks[0].reason(RankError("Rank 2 failed: x")) == "RankError: Rank 2 failed: x"


def test_the_outcome_is_the_first_cause(ranks, tmp_path):
    ranks[2].record(RankError("Rank 1 failed: no space left"))
    ranks[2].record(SettingError("of all ranks, and rank 0 writes it"))
    assert not (tmp_path / "outcome.json").exists()
    ranks[1].record(OSError("no space left"))
    ranks[2].record(OSError("another"))
    ranks[2].record(RuntimeError("peer gone"))
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == 1
    assert outcome["reason"].startswith("rank 1 (")
    assert "OSError: no space left" in outcome["reason"]
    assert ranks[0].reason(RuntimeError("peer gone")) == outcome["reason"]
    assert not ranks[0].is_recorded
    ranks[2].claim("deadline")
    assert ranks[0].is_recorded


def test_whoever_finds_a_rank_gone_first_records_it(ranks, tmp_path):
    ranks[2].record(RuntimeError("peer gone"))
    ranks[1].record(RuntimeError("peer gone"))
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["reason"].startswith("rank 2 (")
    assert "lost another rank, which ended without a word" in outcome["reason"]
    assert ranks[0].reason(RuntimeError("peer gone")) == outcome["reason"]


def test_where_nothing_can_be_written_all_speak(monkeypatch, capfd):
    monkeypatch.setattr(module, "ignore_signals", lambda: None)
    for rank in range(2):
        faults = Faults(Rank(rank, 2), "test")
        faults.record_in("/proc/nowhere")
        assert "ValueError: x\n" in fail(faults, ValueError("x"), capfd)


def test_what_horovod_says_of_a_lost_rank():
    lost = functools.partial(HorovodCommunicator.lost, cast(Any, None))
    gone = "[/x/gloo/transport/tcp/pair.cc:589] Read error [127.0.0.1]:49576: Connection reset"
    assert lost(RuntimeError(gone))
    assert lost(RuntimeError("Horovod has been shut down. This was"))
    assert not lost(OSError("Connection reset by peer"))


def test_sys_exit_for_all_is_an_error():
    def leave():
        raise SystemExit(0)

    with pytest.raises(EarlyExitError, match=r"sys\.exit\(0\) was called in .*leave"):
        on_all(FakeCommunicator(), leave)
