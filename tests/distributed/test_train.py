"""`launch/train.py` under real launchers, as a user starts it: the files, the events, the exits."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# Python runs `sitecustomize` at start-up: each process notes which files it opens for writing,
# renames or makes below WATCHED.
SPY = """
import os, sys
watched, log = os.environ["WATCHED"], os.environ["WATCH_LOG"]
rank = os.environ.get("HOROVOD_RANK", os.environ.get("PMI_RANK", "none"))
def hook(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(path, bytes): path = path.decode()
        if not (flags & (os.O_WRONLY | os.O_RDWR)) or not isinstance(path, str): return
    elif event in ("os.rename", "os.mkdir", "os.remove"):
        path = str(args[0])
    else:
        return
    if path.startswith(watched):
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{rank} {event} {path}\\n".encode())
        os.close(fd)
sys.addaudithook(hook)
"""


def launch(launcher: str, ranks: int, *words: str, env: dict[str, str] | None = None):
    """Runs launch/train.py on some ranks and returns the finished process."""
    starts = {
        "horovod": [str(BIN / "horovodrun"), "-np", str(ranks)],
        "mpi": [str(BIN / "mpiexec"), "-n", str(ranks)],
    }
    return subprocess.run(
        [*starts[launcher], sys.executable, str(ROOT / "launch" / "train.py"), *words],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


def test_four_horovod_ranks_train_the_digits(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SPY)
    run_dir, log = tmp_path / "run", tmp_path / "writes.log"
    env = {
        "PYTHONPATH": str(tmp_path / "site"),
        "WATCHED": str(run_dir),
        "WATCH_LOG": str(log),
    }
    job = launch("horovod", 4, f"run.dir={run_dir}", env=env)
    assert job.returncode == 0, job.stdout + job.stderr

    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    events = [event for event in events if "state" not in event]  # written by a thread, any time
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-3:] == ["stop", "restore", "end"]
    assert "plateau" in kinds
    assert kinds.index("plateau") < kinds.index("stop")
    end = events[-1]
    assert end["ranks_alike"] == 4

    with open(run_dir / "history.csv") as file:
        history = list(csv.DictReader(file))
    stop, restore = events[-3], events[-2]
    assert len(history) == stop["epoch"] + 1
    best = min(range(len(history)), key=lambda i: float(history[i]["val_loss"]))
    assert restore["epoch"] == best
    assert float(history[best]["val_accuracy"]) >= 0.97

    writers = {line.split()[0] for line in log.read_text().splitlines()}
    assert writers == {"0"}
    assert {path.name for path in run_dir.iterdir()} == {
        "best_model.keras",
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "history.csv",
        "outcome.json",
    }
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome == {
        "exit_code": 0,
        "reason": "finished",
        "epoch": stop["epoch"],
        "step": end["step"],
    }
    # Only rank 0 talks, and says in words how it ended.
    assert set(re.findall(r"^\[(\d)\]<stdout>", job.stdout, re.M)) == {"0"}
    assert f"the weights are those of epoch {best + 1}" in job.stdout

    check_saved_model(run_dir, float(history[best]["val_loss"]))


def check_saved_model(run_dir: Path, val_loss: float) -> None:
    """The saved file is the best epoch's, by plain Keras."""
    import keras

    sys.path.insert(0, str(ROOT / "launch"))
    try:
        digits = importlib.import_module("digits")
    finally:
        sys.path.remove(str(ROOT / "launch"))
    _, validation = digits.data(64, seed=0)
    loaded = keras.models.load_model(run_dir / "best_model.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    result = loaded.evaluate(validation, verbose=0, return_dict=True)
    assert result["loss"] == pytest.approx(val_loss, rel=1e-5)


BATCH = "train.global_batch_size=64", "Nearest that are: 63 or 66"
UNWRITABLE = "run.dir=/proc/nowhere", "run.dir=/proc/nowhere cannot be written"


@pytest.mark.parametrize(
    ("launcher", "word", "message"),
    [
        ("horovod", *BATCH),
        ("horovod", *UNWRITABLE),
        ("mpi", *BATCH),
        ("mpi", *UNWRITABLE),
        ("mpi", "train.epoch=3", "Did you mean train.epochs?"),
        ("mpi", "model.factory=digits:nothing", "digits has no function 'nothing'"),
    ],
)
def test_bad_settings_are_said_once_and_write_nothing(launcher, word, message, tmp_path):
    run_dir = tmp_path / "run"
    job = launch(launcher, 3, "train.global_batch_size=63", f"run.dir={run_dir}", word)
    # horovodrun turns any failure of a rank into 1.
    assert job.returncode == (1 if launcher == "horovod" else 2)
    output = job.stdout + job.stderr
    assert output.count("Settings error:") == 1, output
    assert message in output
    # horovodrun itself ends in a traceback; the ranks' lines begin with their number.
    ranks = [x for x in output.splitlines() if launcher == "mpi" or re.match(r"\[\d\]<", x)]
    assert not any("Traceback" in line for line in ranks)
    assert not run_dir.exists()


def test_an_unknown_name_in_a_template_is_found_at_the_first_save(tmp_path):
    config = tmp_path / "settings.yaml"
    text = (ROOT / "launch" / "configs" / "digits.yaml").read_text()
    config.write_text(text.replace("best_model.keras", "'{val_los:.2f}.keras'"))
    run_dir = tmp_path / "run"
    job = launch("mpi", 2, "--config", str(config), f"run.dir={run_dir}", "train.epochs=2")
    assert job.returncode == 2, job.stdout + job.stderr
    output = job.stdout + job.stderr
    assert output.count("Settings error:") == 1
    assert "val_los" in output
    assert "val_loss" in output
    assert not list(run_dir.glob("*.keras"))
    assert json.loads((run_dir / "outcome.json").read_text())["exit_code"] == 2
