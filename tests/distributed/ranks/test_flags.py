"""What one rank raises, all see after the same step, with no message more."""

from __future__ import annotations

from typing import Any

import keras
import pytest

from orchestrator.runtime import Runtime
from tests.distributed import problems
from tests.distributed.rank_plugin import several


class Watch(keras.callbacks.Callback):
    """Raises the flag on one rank after one batch, and notes after which it is seen."""

    def __init__(self, runtime: Runtime, mine: bool, at: int) -> None:
        super().__init__()
        self._runtime, self._mine, self._at = runtime, mine, at
        self.seen: list[int] = []
        self.batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._runtime.flags.seen("failed"):
            self.seen.append(self.batches)
        if self._mine and self.batches == self._at:
            self._runtime.flags.up("failed")
        self.batches += 1


@several
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4}], ids=str)
def test_a_flag_of_one_rank_is_seen_by_all_after_one_step(communicator, options):
    runtime = Runtime(communicator, gradient_buckets=2)
    model = problems.mlp(16, 16)
    optimizer = runtime.distribute(keras.optimizers.SGD(0.1, **options))
    model.compile(optimizer, "sparse_categorical_crossentropy")
    watch = Watch(runtime, runtime.rank == runtime.size - 1, at=2)
    with runtime.use():
        runtime.broadcast(model)
        part = runtime.shard(problems.digits(160), batch_size=32)
        model.fit(part, epochs=2, verbose=0, callbacks=[watch])
    assert watch.batches == 10
    assert communicator.allgather_object(watch.seen) == [list(range(3, 10))] * runtime.size
