"""Shows what Horovod's own Keras layer does on the installed Keras, TensorFlow and Horovod.

    horovodrun -np 2 python tools/horovod_on_keras3.py

Three things that Horovod's documentation tells Keras users to write are each run in `fit` on two
ranks with different data, and what happened is printed as a table. Nothing of this project is
imported. Collectives are counted in Horovod's own timeline, and one allreduce made by hand on
purpose shows that the count works.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import horovod
import horovod.tensorflow.keras as hvd
import keras
import numpy as np
import tensorflow as tf
from horovod.tensorflow import allgather_object, allreduce

STEPS = 10


def fit(optimizer: keras.optimizers.Optimizer, callbacks: list) -> np.ndarray:
    """Trains a small model on this rank's own data; returns its weights."""
    keras.utils.set_random_seed(0)  # the same first weights on all ranks
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse", metrics=["mae"], jit_compile=False)
    x = np.random.default_rng(hvd.rank()).normal(size=(8 * STEPS, 4)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
    return model.get_weights()[0].ravel()


def outcome(optimizer: keras.optimizers.Optimizer, callbacks: list) -> str:
    """What became of one `fit`, on all ranks together."""
    try:
        weights = fit(optimizer, callbacks)
    except Exception as error:  # noqa: BLE001 - the error is the finding
        weights, failure = None, f"{type(error).__name__}: {error}"
    else:
        failure = ""
    everyone = allgather_object((weights, failure))
    failures = [text for _, text in everyone if text]
    if failures:
        return f"fails on {len(failures)} of {hvd.size()} ranks: {failures[0]}"
    spread = max(float(np.abs(w - everyone[0][0]).max()) for w, _ in everyone)
    if spread:
        return f"fit succeeds; the ranks' weights differ by up to {spread:.3g}"
    return "fit succeeds; the ranks end with the same weights"


def allreduced(path: Path) -> list[str]:
    """The name of the tensor of each allreduce in Horovod's timeline."""
    # The file is a JSON list that some ends leave open.
    events = json.loads(path.read_text().rstrip().rstrip("],") + "]")
    names = {e["pid"]: e["args"].get("name") for e in events if e.get("name") == "process_name"}
    return [names[e["pid"]] for e in events if e.get("name") == "ALLREDUCE"]


def main() -> int:
    """Runs the three and prints the table on rank 0."""
    timeline = Path(tempfile.mkdtemp()) / "timeline.json"
    # Both are read at the start, of Horovod (rank 0 writes the timeline) and of TensorFlow.
    os.environ["HOROVOD_TIMELINE"] = str(timeline)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    hvd.init()
    if hvd.size() < 2:
        print("Start me with: horovodrun -np 2 python tools/horovod_on_keras3.py", file=sys.stderr)
        return 2
    sgd = keras.optimizers.SGD
    rows = [
        ("DistributedOptimizer", outcome(hvd.DistributedOptimizer(sgd(0.01)), [])),
        (
            "BroadcastGlobalVariablesCallback",
            outcome(sgd(0.01), [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]),
        ),
        (
            "MetricAverageCallback",
            outcome(sgd(0.01), [hvd.callbacks.MetricAverageCallback()]),
        ),
    ]
    # In a graph, as in fit: eager ones lose their name.
    tf.function(lambda: allreduce(tf.zeros(1), name="by_hand"))()
    rank, size = hvd.rank(), hvd.size()
    hvd.shutdown()
    if rank:
        return 0
    seen = allreduced(timeline)
    others = [name for name in seen if "by_hand" not in name]
    rows.insert(
        1,
        (
            "",
            f"{len(others)} allreduces in its {STEPS} steps "
            f"({len(seen) - len(others)} counted of 1 made by hand, as a control)",
        ),
    )
    print(
        f"Keras {keras.__version__}, TensorFlow {tf.__version__}, Horovod "
        f"{horovod.__version__}, {size} ranks\n"
        + "\n".join(f"{name:34}{text}" for name, text in rows),
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
