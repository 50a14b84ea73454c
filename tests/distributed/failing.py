"""A training in which one rank raises: `python -m tests.distributed.failing RANK [how]`."""

from __future__ import annotations

import os
import signal
import sys
import time

import keras

import orchestrator
from orchestrator import callbacks
from tests.distributed import problems


class OutOfLuck(RuntimeError):
    """What the failing rank raises."""


class Fail(keras.callbacks.Callback):
    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self._rank, self._how = rank, how

    def on_train_batch_end(self, batch, logs=None):
        runtime = orchestrator.runtime.current()
        if runtime.rank == self._rank and int(self.model.optimizer.iterations.numpy()) == 6:
            if self._how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            print(f"RAISED AT {time.time()}", file=sys.stderr, flush=True)
            raise OutOfLuck(f"rank {runtime.rank} of {runtime.size} is out of luck")


def main(rank: int, how: str) -> None:
    runtime = orchestrator.init(seed=7)
    model = problems.mlp(8)
    model.compile(runtime.distribute(keras.optimizers.SGD(0.1)), "sparse_categorical_crossentropy")
    runtime.broadcast(model)
    model.fit(
        runtime.shard(problems.digits(256), batch_size=64),
        epochs=10_000,
        verbose=0,
        callbacks=[Fail(rank, how), callbacks.EarlyStopping("loss", patience=10_000)],
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
