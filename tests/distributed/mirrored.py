"""MirroredStrategy beside one process: the differences in weights and metrics, written as JSON.

python -m tests.distributed.mirrored FILE REPLICAS
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import orchestrator
from orchestrator import callbacks
from orchestrator.config import SettingError
from orchestrator.runtime import Runtime
from tests import metric_cases
from tests.distributed import problems


def classifier(runtime: Runtime, optimizer: Any, **options: Any) -> keras.Model:
    with runtime.scope():
        model = problems.mlp(16, seed=3)
        model.compile(runtime.distribute(optimizer()), "sparse_categorical_crossentropy", **options)
    return model


def tagger(runtime: Runtime, loss: Any) -> keras.Model:
    start = keras.initializers.RandomUniform(seed=3)
    with runtime.scope():
        inputs = keras.Input((6,), dtype="int32")
        x = keras.layers.Embedding(20, 4, start, mask_zero=True)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer=start)(x))
        model.compile(runtime.distribute(keras.optimizers.SGD(0.01)), loss)
    return model


def weighted(count: int) -> tuple[np.ndarray, ...]:
    return (*problems.digits(count), np.linspace(0, 2, count, dtype="float32"))


SGD = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
ADAM = functools.partial(keras.optimizers.Adam, 1e-2, global_clipnorm=0.5)
AVERAGING = functools.partial(keras.optimizers.SGD, 0.1, use_ema=True, ema_momentum=0.5)
ACCUMULATING = functools.partial(keras.optimizers.SGD, 0.1, gradient_accumulation_steps=2)
# name: (model for a runtime, data); batches of 16: partial, of one sample, all smaller than that
CASES: dict[str, Any] = {
    "partial last batch": (lambda r: classifier(r, SGD), problems.digits(45)),
    "last batch of one sample": (lambda r: classifier(r, ADAM), problems.digits(33)),
    "one batch, of three samples": (lambda r: classifier(r, SGD), problems.digits(3)),
    "sample weights": (lambda r: classifier(r, SGD), weighted(45)),
    "mask": (lambda r: tagger(r, "mse"), problems.tokens(45)),
    "a sum": (
        lambda r: tagger(r, keras.losses.MeanAbsoluteError(reduction="sum")),
        problems.tokens(33),
    ),
    "averages in validation": (lambda r: classifier(r, AVERAGING), problems.digits(45)),
    "averages after each epoch": (lambda r: classifier(r, AVERAGING), problems.digits(33)),
}
# By case, from ours or Keras's.
CALLBACKS: dict[str, Any] = {
    "averages in validation": lambda of: [of.SwapEMAWeights()],
    "averages after each epoch": lambda of: [of.SwapEMAWeights(swap_on_epoch=True)],
}


def trained(
    runtime: Runtime, build: Any, data: Any, *own: Any
) -> tuple[list[np.ndarray], list[float]]:
    """The weights, and the losses of training and validation of each epoch."""
    keras.utils.set_random_seed(7)
    model = build(runtime)
    runtime.broadcast(model)
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(16)
    history = model.fit(
        runtime.shard(dataset),
        validation_data=runtime.shard(dataset),
        epochs=2,
        verbose=0,
        callbacks=list(own),
    ).history
    losses = history["loss"] + history["val_loss"]
    return [np.asarray(w, "float64") for w in model.get_weights()], losses


def metrics(runtime: Runtime) -> dict[str, float]:
    """The relative error of every metric of Keras's, each replica with its uneven part."""
    with runtime.scope():
        model = metric_cases.AllMetrics()
    counts = metric_cases.PARTS["uneven"][runtime.replicas]

    def update() -> None:
        context: Any = tf.distribute.get_replica_context()
        replica = int(context.replica_id_in_sync_group)
        begin = sum(counts[:replica])
        model.update(begin, begin + counts[replica])

    assert runtime.strategy is not None
    runtime.strategy.run(update)
    ours = model.get_metrics_result()
    return {
        case.name: metric_cases.relative_error(
            ours[case.name], metric_cases.alone(case, sum(counts))
        )
        for case in metric_cases.CASES
    }


def refused(runtime: Runtime) -> str:
    try:
        trained(runtime, lambda r: classifier(r, ACCUMULATING), problems.digits(45))
    except SettingError as error:
        return str(error)
    return "accepted"


def main(path: str, replicas: str, *names: str) -> None:
    runtime = orchestrator.init("mirrored", seed=7, replicas=int(replicas))
    assert runtime.replicas == int(replicas)
    found = {}
    for name in names or CASES:
        build, data = CASES[name]
        (ours, our_losses), (theirs, losses) = (
            trained(r, build, data, *CALLBACKS.get(name, lambda of: [])(of))
            for r, of in ((runtime, callbacks), (problems.alone(), keras.callbacks))
        )
        found[name] = {
            "weights": problems.worst(ours, theirs),
            "loss": float(np.abs(np.divide(our_losses, losses) - 1).max()),
        }
    found["metrics"] = metrics(runtime)
    found["accumulation"] = refused(runtime)
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
