"""Stopped by anything and started again: the same bytes; on other ranks, the same training."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.distributed import launcher

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("--backend horovod --ranks 2 --faults 3 --seed 4", id="horovod"),
        pytest.param("--backend mpi --ranks 2 --faults 2 --seed 5", id="mpi"),
        pytest.param(
            "--backend single --faults 3 --seed 6 --s3", id="s3", marks=pytest.mark.servers
        ),
    ],
)
def test_a_short_torture(words):
    """The long one: tools/torture --faults 30, under each launcher."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/torture"), "--epochs", "8", *words.split()],
        capture_output=True,
        text=True,
        timeout=500,
        env=launcher.environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bytes" in done.stdout


SETTINGS = {
    "run": {"seed": 3},
    "train": {"epochs": 6, "global_batch_size": 12},
    "data": {"factory": "tests.distributed.resuming:data"},
    "model": {"factory": "tests.distributed.resuming:model"},
    "checkpoint": {"every_steps": 9},
    "callbacks": [
        {"EarlyStopping": {"patience": 4, "restore_best_weights": True}},
        {"ReduceLROnPlateau": {"patience": 1, "min_delta": 0.01}},
    ],
}


def launch(folder: Path, backend: str, ranks: int, signal_at: str | None = None) -> str:
    """Trains on; returns what was printed."""
    settings = folder / "settings.yaml"
    run = {**SETTINGS["run"], "dir": str(folder / "run")}
    settings.write_text(yaml.safe_dump({**SETTINGS, "run": run}))
    env = {} if signal_at is None else {"SIGNAL_AT": signal_at}
    command = ["launch/train.py", "--config", str(settings)]
    finished = launcher.launch(backend, ranks, command, folder, deadline=200, env=env)
    assert not finished.left
    outcome = json.loads((folder / "run/outcome.json").read_text())
    assert outcome["exit_code"] == (0 if signal_at is None else 75), finished.output
    return finished.output


def came_to(folder: Path) -> tuple[list[dict[str, float]], list[tuple]]:
    text = (folder / "run/history.csv").read_text()
    rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines())]
    events = map(json.loads, (folder / "run/events.jsonl").read_text().splitlines())
    decisions = ("best", "plateau", "stop", "restore", "end")
    return rows, [(e["kind"], e["epoch"], e["step"]) for e in events if e["kind"] in decisions]


def goes_on_at(folder: Path) -> str:
    """What the next start is to say: where the last one was stopped, of 21 batches an epoch."""
    stop = json.loads((folder / "run/outcome.json").read_text())
    epoch, step = stop["epoch"], stop["step"]
    return f"Continuing at epoch {epoch + 1}, batch {step - 21 * epoch + 1} (step {step}) "


def test_ranks_of_any_number_go_on_for_each_other(tmp_path):
    """1 process; and 2 Horovod ranks, then 3 of MPI, then 1, each stopped in mid-epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    launch(whole, "none", 1)
    launch(parts, "horovod", 2, signal_at="15:1")
    where = goes_on_at(parts)
    assert where in launch(parts, "mpi", 3, signal_at="30:2")
    where = goes_on_at(parts)
    assert where in launch(parts, "none", 1)
    (rows, decisions), (their_rows, their_decisions) = came_to(whole), came_to(parts)
    assert decisions == their_decisions
    assert {kind for kind, _, _ in decisions} >= {"best", "plateau", "end"}
    for ours, theirs in zip(rows, their_rows, strict=True):
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-5)
    lines = (parts / "run/events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    stops = [(e["rank"], e["notice"], e["step"]) for e in events if e["kind"] == "preempt"]
    assert [stop[:2] for stop in stops] == [(1, "SIGTERM"), (2, "SIGTERM")]
    # Each is sent in a step, and heard by a thread: in that step, or on a busy machine later.
    assert stops[0][2] >= 15
    assert stops[1][2] >= stops[0][2] + 30
    assert [e["ranks_before"] for e in events if e["kind"] == "resume"] == [2, 3]


def test_mirrored_replicas_go_on_to_the_same_bytes(tmp_path):
    """Two CPU replicas, told in their second epoch; the digits, which shuffle by themselves."""
    words = ["run.backend=mirrored", "run.replicas=2", "run.deterministic=true", "train.epochs=3"]
    words += ["model.factory=tests.distributed.holding:model", "checkpoint.every_steps=10"]
    hold = tmp_path / "hold"
    hold.mkdir()

    def start(name: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "launch/train.py", *words, f"run.dir={tmp_path / name}"],
            cwd=ROOT,
            env=launcher.environment(**env),
            stdout=subprocess.DEVNULL,
        )

    assert start("whole").wait(200) == 0
    process = start("parts", HOLD=str(hold))
    while not (hold / "at-0").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    (hold / "go").touch()
    assert process.wait(200) == 75
    assert start("parts").wait(200) == 0
    texts = [(tmp_path / name / "history.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1]
    lines = [
        (tmp_path / name / "events.jsonl").read_text().splitlines() for name in ("whole", "parts")
    ]
    ends = [json.loads(one[-1]) for one in lines]
    assert ends[0]["weights"] == ends[1]["weights"]


@pytest.mark.parametrize("mpi", [False, True], ids=["horovod", "mpi"])
def test_orchestrator_launch_ends_with_75_and_starts_again(tmp_path, mpi):
    """One rank is told; the job is started again by itself, and ends with 0."""
    settings = {**SETTINGS, "run": {"seed": 3, "dir": str(tmp_path / "run")}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    words = ["launch", "-np", "2", *["--mpi"] * mpi, "--", sys.executable, "launch/train.py"]
    words += ["--config", str(tmp_path / "settings.yaml"), "train.epochs=2"]

    def run(*options: str, **env: str):
        return subprocess.run(
            [str(Path(sys.executable).parent / "orchestrator"), words[0], *options, *words[1:]],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=ROOT,
            env=launcher.environment(**env),
        )

    stopped = run(SIGNAL_AT="10:1")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "preempted" in stopped.stderr
    again = run("--restart", "1", SIGNAL_AT="20:0")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "restart 1 of 1" in again.stderr
    assert json.loads((tmp_path / "run/outcome.json").read_text())["exit_code"] == 0
    assert len(os.listdir(tmp_path / "run/checkpoints")) == 3
