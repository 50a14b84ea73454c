"""A report as people and programs read it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.doctor import show
from orchestrator.doctor.judge import judge
from orchestrator.doctor.report import Report
from tests.doctor import seen as s


def report(seen, rank: int = 0) -> Report:
    return Report(seen=seen, findings=judge(seen), rank=rank)


def shown(seen, width: int = 100) -> str:
    file = io.StringIO()
    show.show(report(seen), Console(file=file, width=width))
    return file.getvalue()


def test_all_is_well():
    text = shown(s.two(storage=s.STORED))
    assert text.endswith("\nNothing is off.\n")
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "node1", "CPU", "2", "8", "GiB", "8", "GiB", "65536"] in rows
    assert ["allreduce", "16", "MiB", "40", "ms", "419"] in rows
    assert ["allreduce", "4", "B", "1", "ms"] in rows


def test_what_to_do_is_said():
    seen = s.two(s.rank(0), s.rank(1, limits={"nofile": (1024, None)}), apart="no NIC")
    text = shown(seen)
    assert "nofile: Run `ulimit -n 4096` before the launcher" in text
    assert text.endswith("1 problem, 1 warning.\n")


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    seen = s.two(s.rank(0, host="a-pod-with-a-long-name-0"), s.rank(1), storage=s.STORED)
    assert max(len(line) for line in shown(seen, width).splitlines()) <= width


def test_brackets_are_not_markup():
    seen = s.two(apart="pip install 'keras-orchestrator[mpi]'")
    assert "keras-orchestrator[mpi]" in shown(seen, 200)


def test_json(capsys):
    show.tell(report(s.two(storage=s.STORED)), as_json=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert list(found) == [
        *("format", "exit_code", "backend", "size", "hosts", "apart", "findings"),
        *("ranks", "device", "collectives", "clocks", "storage"),
    ]
    assert found["hosts"] == {"node1": [0, 1]}
    assert found["ranks"][1]["limits"]["nofile"] == [65536, 65536]
    assert found["storage"]["seconds"]["write"] == 0.1
    assert found["findings"][0] == {
        "check": "launch",
        "severity": "ok",
        "found": "2 ranks on 1 host, horovod",
        "expected": "all that were started",
        "todo": "",
    }


def test_only_rank_0_prints(capsys):
    show.tell(report(s.two(), rank=1), as_json=True)
    assert capsys.readouterr() == ("", "")


def test_a_rank_that_cannot_join_says_why(capsys, monkeypatch):
    monkeypatch.setattr(show, "_HOLD_SECONDS", 0.0)
    show.tell(report(replace(s.two(s.rank(1)), apart="no NIC"), rank=1), as_json=True)
    assert capsys.readouterr() == ("", "orchestrator doctor: rank 1 on node1: no NIC\n")
