"""The training that `tools/torture` kills, on its ranks, and what it has come to."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OF_A_PROCESS = importlib.import_module("orchestrator.events").OF_A_PROCESS

STEPS = 20  # an epoch, at least
STATE = ("model.weights.h5", "state.h5")  # generators of all ranks and callbacks are in the latter
INTERVAL = 7  # steps between two checkpoints
CASES = {
    # 35 epochs of 20 steps of 30 ms at least; batches for 1, 2 and 3 ranks
    "conv": {
        "train": {"epochs": 35, "global_batch_size": 12},
        "data": {"factory": "torture_case:data"},
        "model": {"factory": "torture_case:model"},
    },
    "digits": {
        "train": {"epochs": 35, "global_batch_size": 66},
        "data": {"factory": "torture_case:digits_data"},
        "model": {"factory": "torture_case:digits_model"},
    },
}
LAUNCHERS = {"single": [], "horovod": ["horovodrun", "-np"], "mpi": ["mpiexec", "-n"]}
DEADLINE = 240.0


class Job:
    """The command, on its ranks."""

    def __init__(self, options: argparse.Namespace, folder: Path, environment: dict) -> None:
        self.folder = folder
        self.run = folder / "run"
        self._told = folder / "told"
        self._options = options
        self._environment = {**environment, "TORTURE_FOLDER": str(self._told)}
        self._process: subprocess.Popen | None = None
        folder.mkdir()
        settings = {
            "run": {"dir": str(self.run), "seed": 7, "deterministic": True},
            "checkpoint": {
                "every_steps": INTERVAL,
                "keep_last": 2,
                "background": not options.foreground,
            },
            "callbacks": [
                {"ModelCheckpoint": {"filepath": "best.keras", "save_best_only": True}},
                {"EarlyStopping": {"patience": 15, "restore_best_weights": True}},
                {"ReduceLROnPlateau": {"patience": 2, "factor": 0.5, "cooldown": 1}},
            ],
            **CASES[options.case],
        }
        if options.epochs:
            settings["train"] = {**settings["train"], "epochs": options.epochs}
        self.steps = settings["train"]["epochs"] * STEPS
        if options.store:
            settings["checkpoint"]["url"] = f"{options.store}/{folder.name}"
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings))

    def start(self) -> None:
        """Starts it; what the ranks told before is forgotten."""
        shutil.rmtree(self._told, ignore_errors=True)
        self._told.mkdir()
        self._began = time.time()
        launcher = LAUNCHERS[self._options.backend]
        words = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:]] if launcher else []
        words += [str(self._options.ranks)] if launcher else []
        words += [sys.executable, str(ROOT / "launch/train.py")]
        words += ["--config", str(self.folder / "settings.yaml")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def told(self, what: str) -> dict[int, int]:
        """What each rank has told of itself in this life."""
        found = {}
        for path in self._told.glob(f"{what}-*"):
            if path.suffix != ".new":
                found[int(path.name.rpartition("-")[2])] = int(path.read_text() or 0)
        return found

    def is_alive(self) -> bool:
        """Whether the launcher is."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the launcher and all ranks that are there."""
        if self._process is None:
            return
        ranks = filter(_exists, self.told("pid").values())
        for pid in [*([self._process.pid] if self.is_alive() else []), *ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, seconds: float = DEADLINE) -> int:
        """Its exit code, once launcher and ranks have ended."""
        end = time.monotonic() + seconds
        code = self._process.wait(seconds)
        while any(map(_exists, self.told("pid").values())):
            if time.monotonic() > end:
                raise TimeoutError(f"ranks outlive their launcher by {seconds} s")
            time.sleep(0.05)
        return code

    def was_preempted(self) -> bool:
        """Whether this life ended with 75; there may be the outcome of an earlier one."""
        outcome = self.run / "outcome.json"
        if not outcome.exists() or outcome.stat().st_mtime < self._began:
            return False
        return json.loads(outcome.read_text())["exit_code"] == 75

    def events(self) -> list[dict]:
        """What is in events.jsonl."""
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def came_to(self) -> dict[str, str]:
        """All that must be the same, by name, as digests or text."""
        from orchestrator.checkpoint.store import CheckpointStore
        from orchestrator.config import load
        from orchestrator.parts import store_url

        store = CheckpointStore(store_url(load(self.folder / "settings.yaml")))
        with store.newest() as newest:
            files = {name: _content(Path(newest.folder) / name) for name in STATE}
        decided = [
            {key: value for key, value in event.items() if key not in ("time", "path")}
            for event in self.events()
            if event["kind"] not in OF_A_PROCESS and "state" not in event
        ]
        with zipfile.ZipFile(self.run / "best.keras") as archive:
            best = _content(archive.extract("model.weights.h5", self.folder))
        return {
            **files,
            "best.keras": best,
            "history.csv": (self.run / "history.csv").read_text(),
            "decisions": json.dumps(decided),
        }


def _content(path: str | Path) -> str:
    """A digest of an HDF5 file's arrays; between them HDF5 leaves what was in memory."""
    import h5py

    digest = hashlib.sha256()

    def add(name: str, data) -> None:
        if isinstance(data, h5py.Dataset):
            digest.update(f"{name} {data.shape} {data.dtype}".encode() + data[()].tobytes())

    with h5py.File(path, "r") as file:
        file.visititems(add)
    return digest.hexdigest()


def _exists(pid: int) -> bool:
    try:
        # Of a zombie it is empty; the number may be another process's by now.
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
