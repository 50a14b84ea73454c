"""One training, the same on any number of ranks: the validation metrics and decisions it makes.

    python -m tests.distributed.equivalence FILE [backend [replicas]]

writes what it gave as JSON; the single process's is the reference that ranks compare with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator import callbacks
from orchestrator.runtime import Runtime
from tests.distributed import problems
from tests.fakes import Recorder

EPOCHS = 20
VALIDATION = 413  # divisible by neither 2, 3 nor 4; batches of 64, the last of 29
MIN_DELTA = 2e-4


def train(runtime: Runtime) -> dict[str, Any]:
    """Overfits on purpose, so that the validation loss turns: a cut of the rate, then the stop."""
    runtime.events = recorder = Recorder()
    with runtime.scope():
        model = problems.mlp(24, activation="tanh", seed=5)
        model.compile(
            optimizer=runtime.distribute(keras.optimizers.SGD(0.5, momentum=0.9)),
            loss="categorical_crossentropy",
            metrics=[
                keras.metrics.CategoricalAccuracy(name="accuracy"),
                keras.metrics.AUC(multi_label=True, num_labels=10, name="auc"),
                keras.metrics.F1Score(average="macro", name="f1"),
                keras.metrics.OneHotMeanIoU(num_classes=10, sparse_y_pred=False, name="iou"),
                keras.metrics.R2Score(name="r2"),
            ],
        )
    runtime.broadcast(model)
    x, y = problems.digits(200, one_hot=True)
    training = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(200, seed=7)
    training = training.batch(64, drop_remainder=True)
    testing = tf.data.Dataset.from_tensor_slices(problems.digits(VALIDATION, 600, one_hot=True))
    watching = {"monitor": "val_loss", "mode": "min", "min_delta": MIN_DELTA}
    history = model.fit(
        runtime.shard(training),
        validation_data=runtime.shard(testing.batch(64)),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[
            callbacks.EarlyStopping(**watching, patience=4, restore_best_weights=True),
            callbacks.ReduceLROnPlateau(**watching, patience=2, factor=0.3),
        ],
    ).history
    return {
        "metrics": {name: values for name, values in history.items() if name.startswith("val_")},
        "training": {
            name: values
            for name, values in history.items()
            if not name.startswith("val_") and name != "learning_rate"
        },
        "rates": history["learning_rate"],
        "decisions": {k: recorder.epochs(k) for k in ("best", "plateau", "stop", "restore")},
    }


def differences(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The worst absolute difference of each validation metric over all epochs."""
    assert ours["metrics"].keys() == reference["metrics"].keys()
    worst = {}
    for name, values in reference["metrics"].items():
        assert len(ours["metrics"][name]) == len(values), name
        pairs = zip(ours["metrics"][name], values, strict=True)
        worst[name] = max(abs(a - b) for a, b in pairs)
    return worst


def margin(result: dict[str, Any]) -> float:
    """How far the closest comparison of a loss with the best one was from going the other way."""
    best, closest = float("inf"), float("inf")
    for value in result["metrics"]["val_loss"]:
        if best < float("inf"):
            closest = min(closest, abs(value + MIN_DELTA - best))
        if value + MIN_DELTA < best:
            best = value
    return closest


def main(path: str, backend: str = "single", replicas: str | None = None) -> None:
    import orchestrator

    runtime = orchestrator.init(backend, seed=7, replicas=int(replicas) if replicas else None)
    Path(path).write_text(json.dumps(train(runtime)))


if __name__ == "__main__":
    main(*sys.argv[1:])
