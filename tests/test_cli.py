"""`orchestrator checkpoints`, as from a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.checkpoint.store import CheckpointStore


@pytest.fixture
def store(tmp_path):
    """Three checkpoints, the middle one the best."""
    made = CheckpointStore(str(tmp_path / "store"))
    for step, loss in ((10, 0.5), (20, 0.25), (30, 0.75)):

        def write(path: str, step: int = step) -> None:
            Path(path).write_bytes(b"x" * step)

        made.save(
            {"weights": write},
            step=step,
            epoch=step // 10 - 1,
            metrics={"val_loss": loss},
            world_size=4,
        )
    return made


def run(*words):
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_ls(store):
    result = run("checkpoints", "ls", store.url)
    assert result.returncode == 0, result.stderr
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "val_loss" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["10", "0", "0.0", "4", "val_loss 0.5"],
        ["20", "1", "0.0", "4", "val_loss 0.25"],
        ["30", "2", "0.0", "4", "val_loss 0.75"],
    ]


def test_verify(store):
    assert run("checkpoints", "verify", store.url).returncode == 0
    (broken,) = [p for p in Path(store.url).rglob("weights") if p.stat().st_size == 20]
    broken.chmod(0o644)
    broken.write_bytes(b"y" * 20)
    result = run("checkpoints", "verify", store.url)
    assert result.returncode == 1
    assert result.stdout.count("whole") == 2


def test_prune(store):
    result = run("checkpoints", "prune", store.url, "--best", "val_loss")
    assert result.returncode == 0, result.stderr
    assert "removed 1 checkpoints" in result.stdout
    assert [one.step for one in store.list()] == [20, 30]
    assert run("checkpoints", "prune", store.url).returncode == 0
    assert [one.step for one in store.list()] == [20, 30]


def test_nothing_there(tmp_path):
    result = run("checkpoints", "ls", str(tmp_path / "none"))
    assert (result.returncode, "no checkpoints" in result.stdout) == (0, True)


def test_bad_input():
    result = run("checkpoints", "ls", "nonesuch://bucket")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "nonesuch" in result.stderr
    assert run("checkpoints", "prune", "x", "--last", "0").returncode == 2
