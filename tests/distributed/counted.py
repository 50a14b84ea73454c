"""Trains a little on every rank, for test_collectives.py to count in Horovod's own timeline."""

from __future__ import annotations

import keras

import orchestrator
from orchestrator import callbacks
from tests.distributed import problems

EPOCHS, STEPS, BUCKETS = 3, 5, 2


def main() -> None:
    runtime = orchestrator.init(seed=1, gradient_buckets=BUCKETS)
    model = problems.mlp(32, 32, 32)
    optimizer = runtime.distribute(keras.optimizers.Adam())
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
