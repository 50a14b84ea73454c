"""How long until the first step: of a run that goes on, beside one that starts.

    .venv/bin/python benchmarks/resume_start.py [--rounds 10] [--backend horovod --ranks 2]

Both start launch/train.py anew, in turns, with the small network of tools/torture. The one that
goes on does so in the middle of an epoch, and reads its checkpoint from the local disk. From the
start of the process to the end of its first step, which a rank tells in a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = {"single": [], "horovod": ["horovodrun", "-np"], "mpi": ["mpiexec", "-n"]}
DEADLINE = 120.0


def start(options: argparse.Namespace, folder: Path, told: Path) -> subprocess.Popen:
    """Starts the training of a run folder."""
    shutil.rmtree(told, ignore_errors=True)
    told.mkdir()
    settings = {
        "run": {"dir": str(folder), "seed": 7, "deterministic": True},
        "train": {"epochs": 30, "global_batch_size": 10},
        "data": {"factory": "torture_case:data"},
        "model": {"factory": "torture_case:model"},
        "checkpoint": {"every_steps": 7},
    }
    (told / "settings.yaml").write_text(yaml.safe_dump(settings))
    launcher = LAUNCHERS[options.backend]
    words = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:]] if launcher else []
    words += [str(options.ranks)] if launcher else []
    words += [sys.executable, str(ROOT / "launch/train.py"), "--config", f"{told}/settings.yaml"]
    environment = {
        **os.environ,
        "TORTURE_FOLDER": str(told),
        "PYTHONPATH": str(ROOT / "tools"),
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_NUM_INTRAOP_THREADS": "1",
    }
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def end(process: subprocess.Popen, told: Path) -> None:
    """Kills launcher and ranks."""
    for path in told.glob("pid-*"):
        os.kill(int(path.read_text()), signal.SIGKILL)
    process.kill()
    process.wait()


def first_step(options: argparse.Namespace, folder: Path, told: Path) -> float:
    """Seconds until the first step is made."""
    began = time.monotonic()
    process = start(options, folder, told)
    try:
        while not (told / "steps-0").exists():
            if process.poll() is not None or time.monotonic() - began > DEADLINE:
                sys.exit(f"no step in {folder}: it ended with {process.poll()}")
            time.sleep(0.005)
        return time.monotonic() - began
    finally:
        end(process, told)


def prepare(options: argparse.Namespace, folder: Path, told: Path) -> None:
    """A run that was stopped in its 20th epoch."""
    process = start(options, folder, told)
    wanted, began = folder / "checkpoints" / f"step-{20 * 23 + 2:010}", time.monotonic()
    while not (wanted / "manifest.json").exists():
        if process.poll() is not None or time.monotonic() - began > DEADLINE:
            sys.exit(f"{wanted} did not come: it ended with {process.poll()}")
        time.sleep(0.05)
    end(process, told)


def main() -> None:
    """Prints the ratio's quartiles, and writes benchmarks/results/resume_start.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=LAUNCHERS, default="single")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, told = Path(name), Path(name) / "told"
        prepare(options, folder / "stopped", told)
        taken: dict[str, list[float]] = {"fresh": [], "resumed": []}
        for number in range(options.rounds):
            for kind in list(taken)[:: -1 if number % 2 else 1]:
                run = folder / kind
                shutil.rmtree(run, ignore_errors=True)
                if kind == "resumed":
                    shutil.copytree(folder / "stopped", run)
                taken[kind].append(first_step(options, run, told))
    ratios = np.percentile(np.divide(taken["resumed"], taken["fresh"]), [50, 25, 75])
    medians = {kind: float(np.median(values)) for kind, values in taken.items()}
    print(
        f"{options.backend}, {options.rounds} pairs: until the first step a fresh run takes "
        f"{medians['fresh']:.2f} s, one that goes on {medians['resumed']:.2f} s; ratio "
        "{:.2f} [{:.2f}, {:.2f}] (goal: 1.2 and the read)".format(*ratios)
    )
    results = ROOT / "benchmarks/results/resume_start.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps({"options": vars(options), "seconds": taken}, indent=1) + "\n")


if __name__ == "__main__":
    main()
