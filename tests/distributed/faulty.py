"""A training in which one rank goes wrong: `python -m tests.distributed.faulty FOLDER FAULT RANK`.

With launch/train.py's own main, so that what is seen is what a user sees.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import yaml

import orchestrator
from launch.train import main as train
from orchestrator.backends import launched_rank

importlib.import_module("orchestrator.training")  # before the clock is read
AT = 6  # steps
PAUSE = 0.05  # seconds a step, of a rank that is slow: ten times and more of what a step takes
ROWS, BATCH = 240, 12


class OutOfLuck(RuntimeError):
    """What the failing rank raises."""


def asked() -> tuple[Path, str, int]:
    folder, fault, rank = sys.argv[1:4]
    return Path(folder), fault, int(rank)


def now() -> None:
    """Notes when it went wrong."""
    (asked()[0] / "fault-at").write_text(str(time.time()))


def is_here(fault: str) -> bool:
    return asked()[1] == fault and launched_rank() == asked()[2]


def data(global_batch_size: int, seed: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 6)).astype("float32")
    y = (x @ rng.normal(size=(6, 3))).argmax(1).astype("int32")
    if asked()[1] not in ("missing step", "data pipeline"):
        return (x, y), (x[:48], y[:48])

    def batches():
        for step in range(ROWS // BATCH):
            if step == AT and is_here("data pipeline"):
                now()
                raise OutOfLuck("a record cannot be read")
            if step == AT and is_here("missing step"):
                now()
                return
            yield x[step * BATCH :][:BATCH], y[step * BATCH :][:BATCH]

    specs = (tf.TensorSpec([None, 6], tf.float32), tf.TensorSpec([None], tf.int32))
    return tf.data.Dataset.from_generator(batches, output_signature=specs), None


class GoWrong(keras.callbacks.Callback):
    """Does what was asked for, after a step."""

    def on_train_batch_end(self, batch, logs=None):
        _, fault, rank = asked()
        if launched_rank() != rank:
            return
        step = int(self.model.optimizer.iterations.numpy())
        if step == AT and fault in ACTS:
            now()
            ACTS[fault](self.model)
        if step >= AT and fault == "slow":
            time.sleep(PAUSE)


def raise_(model):
    raise OutOfLuck(f"rank {launched_rank()} is out of luck")


def flip(model):
    variable = model.trainable_variables[0]
    values = variable.numpy()
    values.view(np.uint32).reshape(-1)[0] ^= 1
    variable.assign(values)


def poison(model):
    # The weights stay alike: only this rank's loss is looked at.
    model.metrics[0].update_state(np.nan)


ACTS = {
    "exception": raise_,
    "sys.exit(0)": lambda model: sys.exit(0),
    "sys.exit(3)": lambda model: sys.exit(3),
    "os._exit(3)": lambda model: os._exit(3),
    "SIGKILL": lambda model: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda model: ctypes.string_at(0),
    "SIGSTOP": lambda model: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda model: time.sleep(3600),
    "bit flip": flip,
    "NaN": poison,
    "slow": lambda model: None,
}


class Faulty(keras.Sequential):
    """A callback of a user's, which settings cannot hold."""

    def fit(self, *args, **kwargs):
        kwargs["callbacks"] = [GoWrong(), *kwargs["callbacks"]]
        return super().fit(*args, **kwargs)


def model() -> keras.Model:
    net = Faulty([keras.Input((6,)), keras.layers.Dense(3, activation="softmax")])
    net.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy")
    return net


SETTINGS: dict = {
    "train": {"epochs": 3, "global_batch_size": BATCH},
    "data": {"factory": "tests.distributed.faulty:data"},
    "model": {"factory": "tests.distributed.faulty:model"},
    "callbacks": [
        {"ConsistencyGuard": {"check_freq": 2}},
        {"TerminateOnNaN": {"raise_error": True}},
    ],
}


def main() -> int:
    sys.modules["tests.distributed.faulty"] = sys.modules[__name__]
    folder, fault, _ = asked()
    settings = folder / f"settings-{launched_rank()}.yaml"
    if fault == "slow":  # beside the guard's own time few are ten times as slow
        SETTINGS["callbacks"] = []
    run = {"dir": str(folder / "run"), "seed": 1, "timeout": float(os.environ["TIMEOUT"])}
    settings.write_text(yaml.safe_dump({"run": run, **SETTINGS}))
    words = ["--config", str(settings)]
    if is_here("other version"):
        orchestrator.__version__ = "0.0.9"
    if is_here("absent"):
        now()
        os.kill(os.getpid(), signal.SIGSTOP)
    if is_here("other settings"):
        words.append("train.epochs=4")
    if fault in ("other version", "other settings"):
        now()
    return train(words)


if __name__ == "__main__":
    code = main()
    sys.exit(code)
