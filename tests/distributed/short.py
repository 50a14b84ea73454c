"""A training whose data end early on one rank: `python -m tests.distributed.short RANK how`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import orchestrator
from tests.distributed import problems

BATCHES = 6


def batches(count: int) -> Iterator[Any]:
    x, y = problems.digits(64)
    for _ in range(count):
        yield x, y
    if count < BATCHES:
        print(f"RAN OUT AT {time.time()}", file=sys.stderr, flush=True)


class Data(keras.utils.PyDataset):
    """Says that it has more batches than it can give."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    @property
    def num_batches(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        if index >= self._count:
            print(f"RAN OUT AT {time.time()}", file=sys.stderr, flush=True)
            raise IndexError(f"batch {index} of {self._count}")
        return problems.digits(64)


def of_unknown_length(count: int) -> tf.data.Dataset:
    x, y = problems.digits(64)
    specs = (tf.TensorSpec([None, 64], x.dtype), tf.TensorSpec([None], y.dtype))
    return tf.data.Dataset.from_generator(lambda: batches(count), output_signature=specs)


def promised(count: int) -> tf.data.Dataset:
    return of_unknown_length(count).apply(tf.data.experimental.assert_cardinality(BATCHES))


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "generator": (batches, {"steps": BATCHES}),
    "unknown": (of_unknown_length, {"steps": BATCHES}),
    "promised": (promised, {}),
    "py-dataset": (Data, {}),
}


def main(rank: int, how: str) -> None:
    runtime = orchestrator.init(seed=7)
    make, options = KINDS[how]
    model = problems.mlp(8)
    model.compile(runtime.distribute(keras.optimizers.SGD(0.1)), "sparse_categorical_crossentropy")
    runtime.broadcast(model)
    data = runtime.shard(make(BATCHES - 2 if runtime.rank == rank else BATCHES), **options)
    model.fit(data, verbose=0)
    print("NOBODY NOTICED", float(np.sum(model.get_weights()[0])), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
