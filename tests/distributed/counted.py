"""Trains a little on every rank, for test_collectives.py to count in Horovod's own timeline."""

from __future__ import annotations

from typing import Any

import keras

import orchestrator
from orchestrator import callbacks
from tests.distributed import problems

EPOCHS, STEPS, BUCKETS, ACCUMULATE = 3, 5, 2, 4


def main() -> None:
    runtime = orchestrator.init(seed=1, gradient_buckets=BUCKETS)
    train(runtime, keras.optimizers.Adam())
    train(runtime, keras.optimizers.SGD(gradient_accumulation_steps=ACCUMULATE))


def train(runtime: Any, optimizer: keras.optimizers.Optimizer) -> None:
    model = problems.mlp(32, 32, 32)
    runtime.distribute(optimizer)
    metrics = ["accuracy", keras.metrics.AUC(), keras.metrics.F1Score(), keras.metrics.R2Score()]
    model.compile(optimizer, "categorical_crossentropy", metrics=metrics)
    runtime.broadcast(model)
    model.fit(
        runtime.shard(problems.digits(STEPS * 32, one_hot=True), batch_size=32),
        validation_data=runtime.shard(problems.digits(50, 200, True), batch_size=32),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[callbacks.EarlyStopping(patience=9), callbacks.ReduceLROnPlateau(patience=9)],
    )


if __name__ == "__main__":
    main()
