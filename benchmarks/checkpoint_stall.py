"""What a checkpoint costs: how long it holds up training, how fast it is written, its memory.

    .venv/bin/python benchmarks/checkpoint_stall.py

Prints tables with the goals and writes benchmarks/results/checkpoint_stall.json. The machine may be
busy: contestants take turns in one process, and only ratios within a turn count. Keras's
OrbaxCheckpoint takes part where `orbax-checkpoint` is installed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from run import ROOT, Row, table

LAYERS = 8
STALLS = ("warm memory copy", "ours", "ModelCheckpoint weights", "ModelCheckpoint", "Orbax")
PLAIN = "plain write, fsync"
PLAIN_WHOLE = "the same, rename, fsync of the folder"
HASH = "SHA-256 alone, not written"
SAVES = {  # and what a plain write would have to do for the same
    "our weights": PLAIN,
    "our weights, rename, fsync of the folder": PLAIN_WHOLE,
    "our weights in a store, with a manifest": PLAIN_WHOLE,
    "our model": PLAIN,
    "Keras weights, fsync": PLAIN,
    "Keras model, fsync": PLAIN,
}
MEMORY = ("our weights", "our model", "Keras weights", "Keras model")
DEADLINE = 600
MEGA = 1e6
WEIGHTS, MODEL = "m.weights.h5", "m.keras"
HAS_ORBAX = any(importlib.metadata.distributions(name="orbax-checkpoint"))
Timed = Callable[[], float]


def build(megabytes: int) -> Any:
    """A trained model whose weights and Adam state have about that many megabytes."""
    import keras

    width = int((megabytes * MEGA / 3 / 4 / LAYERS) ** 0.5)
    layers = [keras.layers.Dense(width) for _ in range(LAYERS)]
    model = keras.Sequential([keras.Input((width,)), *layers])
    model.compile(optimizer="adam", loss="mse")
    model.train_on_batch(np.ones((1, width)), np.ones((1, width)))
    return model


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def written(folder: str, write: Callable[[str], object], name: str) -> float:
    """Times the writing of a file, which is then removed: nothing is left for the disk to do."""
    path = os.path.join(folder, name)
    taken = seconds(lambda: write(path))
    os.unlink(path)
    return taken


class Ours:
    """A background save, both its parts timed: what the caller waits for, and the writing."""

    def __init__(self, model: Any, folder: str) -> None:
        from orchestrator.checkpoint.state import Snapshot
        from orchestrator.checkpoint.writer import Writer

        self._folder = folder
        self._writer = Writer(lambda: Snapshot(model))
        self._writer.prepare()
        self._ended = threading.Event()
        self.writing = 0.0

    def save(self, write: Callable[[Any, str], object], name: str) -> float:
        self._ended.clear()

        def timed(snapshot: Any) -> None:
            self.writing = written(self._folder, lambda path: write(snapshot, path), name)
            self._ended.set()

        from orchestrator.checkpoint.state import Snapshot

        stall = seconds(lambda: self._writer.submit(Snapshot.copy, timed))
        self._ended.wait()
        self._writer.raise_if_failed()
        return stall


def keras_callback(model: Any, folder: str, *, weights_only: bool) -> Timed:
    import keras

    name = WEIGHTS if weights_only else MODEL
    path = os.path.join(folder, name)
    callback = keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only)
    callback.set_model(model)
    callback.on_train_begin()
    return lambda: written(folder, lambda _: callback.on_epoch_end(0, {}), name)


def orbax(model: Any, folder: str) -> Timed:
    import keras

    callback = keras.callbacks.OrbaxCheckpoint(os.path.join(folder, "orbax"))
    callback.set_model(model)
    epochs = iter(range(10**6))

    def save() -> float:
        taken = seconds(lambda: callback.on_epoch_end(next(epochs), {}))
        callback.wait_until_finished()
        return taken

    return save


def plain(path: str, state: Any) -> None:
    with open(path, "wb") as file:
        file.write(state)
        file.flush()
        os.fsync(file.fileno())


def contestants(model: Any, state: np.ndarray, folder: str) -> dict[str, Timed]:
    from orchestrator import storage
    from orchestrator.checkpoint.state import Snapshot

    ours = Ours(model, folder)
    other = np.copy(state)

    def writing(write: Callable[[Any, str], object], name: str) -> Timed:
        def timed() -> float:
            ours.save(write, name)
            return ours.writing

        return timed

    def whole(snapshot: Any, path: str) -> None:
        storage.replace(path, snapshot.write_weights)

    def plain_whole(path: str) -> None:
        storage.replace(path, lambda temporary: plain(temporary, state))

    return {
        "warm memory copy": lambda: seconds(lambda: np.copyto(other, state)),
        "ours": lambda: ours.save(Snapshot.write_weights, WEIGHTS),
        "ModelCheckpoint weights": keras_callback(model, folder, weights_only=True),
        "ModelCheckpoint": keras_callback(model, folder, weights_only=False),
        **({"Orbax": orbax(model, folder)} if HAS_ORBAX else {}),
        PLAIN: lambda: written(folder, lambda path: plain(path, state), "plain"),
        PLAIN_WHOLE: lambda: written(folder, plain_whole, "plain"),
        HASH: lambda: seconds(lambda: hashlib.sha256(state.data)),
        "our weights": writing(Snapshot.write_weights, WEIGHTS),
        "our weights, rename, fsync of the folder": writing(whole, WEIGHTS),
        "our weights in a store, with a manifest": lambda: in_store(ours, folder),
        "our model": writing(Snapshot.write_model, MODEL),
        "Keras weights, fsync": keras_then_sync(model.save_weights, folder, WEIGHTS),
        "Keras model, fsync": keras_then_sync(model.save, folder, MODEL),
    }


def keras_then_sync(save: Callable[[str], object], folder: str, name: str) -> Timed:
    def write(path: str) -> None:
        save(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    return lambda: written(folder, write, name)


def in_store(ours: Ours, folder: str) -> float:
    from orchestrator.checkpoint.store import CheckpointStore

    url = os.path.join(folder, "store")
    writing = [0.0]

    def write(snapshot: Any, path: str) -> None:
        files = {WEIGHTS: snapshot.write_weights}
        store = CheckpointStore(url)
        writing[0] = seconds(lambda: store.save(files, step=1, epoch=0, metrics={}, world_size=1))
        shutil.rmtree(url)
        Path(path).touch()

    ours.save(write, WEIGHTS)
    return writing[0]


def times(megabytes: int, rounds: int) -> dict[str, Any]:
    """All contestants' seconds, a list of turns each; every second round goes backwards."""
    model = build(megabytes)
    variables = [*model.variables, *model.optimizer.variables]
    state = np.concatenate([np.ravel(v.numpy()).view(np.uint8) for v in variables])
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as folder:
        timed = contestants(model, state, folder)
        taken: dict[str, list[float]] = {name: [] for name in timed}
        for number in range(rounds + 1):
            for name in list(timed)[:: -1 if number % 2 else 1]:
                value = timed[name]()
                if number:  # the first round warms up
                    taken[name].append(value)
    return {"bytes": state.nbytes, "seconds": taken}


def memory(megabytes: int, name: str) -> dict[str, Any]:
    """The most memory held in three saves beyond what was held before, by the kernel's count."""
    model = build(megabytes)
    nbytes = sum(v.numpy().nbytes for v in (*model.variables, *model.optimizer.variables))
    gc.collect()
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as folder:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before = status("VmRSS")
        save = saver(model, name)
        for _ in range(3):
            save(os.path.join(folder, WEIGHTS if "weights" in name else MODEL))
    return {"save": name, "bytes": nbytes, "peak": status("VmHWM") - before}


def saver(model: Any, name: str) -> Callable[[str], object]:
    if name == "Keras weights":
        return model.save_weights
    if name == "Keras model":
        return model.save
    from orchestrator.checkpoint.state import Snapshot

    snapshot = Snapshot(model)
    write = snapshot.write_weights if name == "our weights" else snapshot.write_model

    def save(path: str) -> None:
        snapshot.copy()
        write(path)

    return save


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def ratios(taken: dict[str, list[float]], name: str, to: str, *, inverse: bool = False) -> Any:
    """Quartiles of the ratio within each turn."""
    values = np.array(taken[name]) / np.array(taken[to])
    return quartiles(1 / values if inverse else values)


def quartiles(values: Any) -> list[float]:
    return [float(v) for v in np.percentile(values, [25, 50, 75])]


def stall_rows(result: dict[str, Any]) -> list[Row]:
    taken = result["seconds"]
    return [
        {
            "contestant": name,
            "turns": len(taken[name]),
            "ms": quartiles(1e3 * np.array(taken[name])),
            "to_copy": ratios(taken, name, "warm memory copy"),
            "ours_to_it": [] if name == "ours" else ratios(taken, "ours", name),
        }
        for name in STALLS
        if name in taken
    ]


def save_rows(result: dict[str, Any]) -> list[Row]:
    taken = result["seconds"]
    return [
        {
            "save": name,
            "MB/s": quartiles(result["bytes"] / MEGA / np.array(taken[name])),
            "best": f"{result['bytes'] / MEGA / min(taken[name]):.0f}",
            "to_plain": ratios(taken, name, to, inverse=True) if to else [],
        }
        for name, to in {PLAIN: None, PLAIN_WHOLE: None, HASH: None, **SAVES}.items()
    ]


def child(*options: str) -> Any:
    """Runs this file anew: each measurement has a process of its own."""
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, *options, "--out", str(out)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=DEADLINE
        )
        if done.returncode or not out.exists():
            sys.exit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(command)}")
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[30, 300])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/checkpoint_stall.json"
    )
    parser.add_argument("--only", choices=("times", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = arguments.megabytes[0]
    if arguments.only == "times":
        results: Any = times(size, arguments.rounds)
    elif arguments.only == "memory":
        results = memory(size, arguments.save)
    else:
        results = everything(arguments.megabytes, arguments.rounds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def everything(sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    print("median [first quartile, third quartile]; ratios are within one turn")
    if not HAS_ORBAX:
        print("orbax-checkpoint is not installed: without Keras's OrbaxCheckpoint")
    results = []
    for size in sizes:
        options = ("--megabytes", str(size))
        result = child("--only", "times", "--rounds", str(rounds), *options)
        command = f"benchmarks/checkpoint_stall.py --megabytes {size} --rounds {rounds}"
        columns = {"contestant": "contestant", "turns": "turns", "ms": "ms"}
        columns |= {"/ copy (ours: 4 at most)": "to_copy"}
        columns |= {"ours / it (Keras's: 0.125 at most)": "ours_to_it"}
        megabytes = result["bytes"] / MEGA
        table(f"Stall of a save, {megabytes:.0f} MB", command, stall_rows(result), columns)
        columns = {"save": "save", "MB/s": "MB/s", "best MB/s": "best"}
        columns |= {"/ plain (ours: 0.9 at least)": "to_plain"}
        table(f"To the local disk, {megabytes:.0f} MB", command, save_rows(result), columns)
        used = [child("--only", "memory", "--save", name, *options) for name in MEMORY]
        for row in used:
            row["to_state"] = f"{row['peak'] / row['bytes']:.2f}"
        columns = {"save": "save", "peak / state (ours: 1.2 at most)": "to_state"}
        table(f"Memory beside the model, {megabytes:.0f} MB", command, used, columns)
        results.append({**result, "memory": used, "load": os.getloadavg()})
    return results


if __name__ == "__main__":
    main()
