"""`events.jsonl` and `outcome.json`."""

from __future__ import annotations

import json
import math
import os
import time

import fsspec
import numpy as np
import pytest

from orchestrator.events import Events, RunDirectory


def strict(line: str) -> dict:
    """Reads JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(folder) -> list[dict]:
    return [strict(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_no_directory_no_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Events().emit("stop", epoch=1, step=2, rank=0, value=3.0)
    assert os.listdir(tmp_path) == []


def test_one_line_a_decision(tmp_path):
    directory = RunDirectory(str(tmp_path / "run"))
    before = time.time()
    directory.emit("start", epoch=None, step=0, rank=0, backend="single", ranks=1)
    directory.emit("stop", epoch=4, step=50, rank=3, monitor="val_loss", value=0.25, best_epoch=2)
    first, second = lines(tmp_path / "run")
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {
        "epoch": None,
        "step": 0,
        "rank": 0,
        "kind": "start",
        "backend": "single",
        "ranks": 1,
    }
    assert second == {
        "epoch": 4,
        "step": 50,
        "rank": 3,
        "kind": "stop",
        "monitor": "val_loss",
        "value": 0.25,
        "best_epoch": 2,
    }


def test_not_finite_numbers_are_strings(tmp_path):
    directory = RunDirectory(str(tmp_path))
    directory.emit(
        "nan",
        epoch=0,
        step=1,
        rank=0,
        value=math.nan,
        above=math.inf,
        below=-math.inf,
        many=[1.0, math.nan],
        number=np.float32(0.5),
        count=np.int64(3),
        other=np.float32("nan"),
    )
    (event,) = lines(tmp_path)
    assert (event["value"], event["above"], event["below"]) == ("nan", "inf", "-inf")
    assert event["many"] == [1.0, "nan"]
    assert (event["number"], event["count"], event["other"]) == (0.5, 3, "nan")


def test_outcome(tmp_path):
    directory = RunDirectory(str(tmp_path))
    directory.outcome(0, "finished", 7, 160)
    assert (tmp_path / "outcome.json").read_text().endswith("\n")
    assert strict((tmp_path / "outcome.json").read_text()) == {
        "exit_code": 0,
        "reason": "finished",
        "epoch": 7,
        "step": 160,
    }


def test_an_earlier_run_is_replaced(tmp_path):
    directory = RunDirectory(str(tmp_path))
    directory.emit("start", epoch=None, step=0, rank=0)
    directory.outcome(0, "finished", 7, 160)
    RunDirectory(str(tmp_path))
    assert lines(tmp_path) == []
    assert not (tmp_path / "outcome.json").exists()


def test_anywhere(tmp_path):
    fs = fsspec.filesystem("memory")
    directory = RunDirectory("memory://tests/events")
    try:
        directory.emit("start", epoch=None, step=0, rank=0)
        directory.emit("end", epoch=1, step=2, rank=0)
        directory.outcome(0, "finished", 1, 2)
        text = fs.cat_file("/tests/events/events.jsonl").decode()
        assert [strict(line)["kind"] for line in text.splitlines()] == ["start", "end"]
        assert strict(fs.cat_file("/tests/events/outcome.json").decode())["exit_code"] == 0
    finally:
        fs.rm("/tests", recursive=True)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_directory_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        RunDirectory(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["file"]
