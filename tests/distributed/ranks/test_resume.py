"""What each rank holds by itself goes on too, bit for bit, from the middle of an epoch."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.checkpoint.retention import EverySteps
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.runtime import Runtime
from tests.distributed import problems
from tests.distributed.rank_plugin import three


def network(masked=False):
    """Dropout, augmentation and moving statistics: of each rank's own."""
    layers = [keras.layers.Masking(0.0)] if masked else []
    layers += [
        keras.layers.GaussianNoise(0.1),
        keras.layers.Dense(8, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(3, "softmax"),
    ]
    return keras.Sequential([keras.Input((4, 5) if masked else (5,)), *layers])


def sequences():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(61, 4, 5)).astype("float32")
    lengths = rng.integers(1, 5, size=61)
    x[np.arange(4)[None] >= lengths[:, None]] = 0
    return x, rng.integers(0, 3, (61, 4)).astype("int32")


def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(61, 5)).astype("float32"), rng.integers(0, 3, 61).astype("int32")


CASES = {
    "plain": (rows, {}, {}),
    "accumulated": (rows, {"gradient_accumulation_steps": 4}, {}),
    "masked": (sequences, {}, {"masked": True}),
}


class StopAt(keras.callbacks.Callback):
    """On all ranks."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if self._left == 0:
            raise InterruptedError("by the test")


def train(communicator, case, *extra):
    """A process's training from its beginning on, as far as it gets."""
    data, optimizer, options = CASES[case]
    runtime = Runtime(communicator, seed=3)
    keras.backend.clear_session()
    keras.utils.set_random_seed(3)
    with runtime.use():
        part = runtime.shard(data(), batch_size=12, shuffle=True)  # six steps an epoch
        valid = runtime.shard(data(), batch_size=12)
        model = network(**options)
        model.compile(
            runtime.distribute(keras.optimizers.Adam(0.02, **optimizer)),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        runtime.broadcast(model)
        try:
            model.fit(part, validation_data=valid, epochs=3, verbose=0, callbacks=[*extra])
        except InterruptedError:
            for one in extra:
                if isinstance(one, callbacks.StoreCheckpoint):
                    one.close()
                    runtime.on_root(one._writer.close)
            return None
    state = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    return problems.bits(state), model.history.history


@three
@pytest.mark.parametrize("case", CASES)
def test_it_ends_as_if_it_had_not_been_stopped(communicator, shared_path, case):
    whole = train(communicator, case, callbacks.GlobalMetrics())
    url = str(shared_path / "store")
    saver = callbacks.StoreCheckpoint(url, save=EverySteps(5))
    assert train(communicator, case, saver, StopAt(11)) is None
    assert [one.step for one in CheckpointStore(url).list()] == [5, 10]
    resumed = train(communicator, case, callbacks.StoreCheckpoint(url, save=[], resume=True))
    assert resumed == whole
