"""Around `fit`: one rank prints, data not sharded are named, and nobody leaves alone."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator.agreement import EarlyExitError
from orchestrator.fitting import is_part
from orchestrator.preemption import Preempted
from orchestrator.runtime import Runtime
from tests.fakes import FakeCommunicator


def ready(rank: int) -> tuple[Runtime, keras.Model]:
    runtime = Runtime(FakeCommunicator(rank, 2))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    runtime.prepare(model)
    return runtime, model


def part(runtime: Runtime):
    return runtime.shard((np.ones((8, 2)), np.ones((8, 1))), batch_size=4)


class Leave(keras.callbacks.Callback):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def on_train_batch_end(self, batch, logs=None):
        raise self._error


def test_what_comes_from_shard_is_known():
    runtime, _ = ready(0)
    sharded = part(runtime)
    assert is_part(sharded)
    assert is_part(sharded.map(lambda x, y: (x * 2, y)).prefetch(1))
    assert is_part(tf.data.Dataset.zip(sharded, sharded))
    assert not is_part(tf.data.Dataset.range(3))
    assert not is_part(np.ones(3))
    both = runtime.shard((np.ones((8, 2)), np.ones((8, 1))), batch_size=4, validation_split=0.5)
    assert all(map(is_part, both))


@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_are_not_sharded_are_named_once(rank, capsys):
    runtime, model = ready(rank)
    model.fit(part(runtime), verbose=0)
    assert "shard" not in capsys.readouterr().out
    for _ in range(2):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert capsys.readouterr().out.count("does not come from runtime.shard()") == (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_shows_progress(rank, capsys):
    runtime, model = ready(rank)
    model.fit(part(runtime), None, None, 2, 2)  # epochs and verbose by position
    assert ("Epoch 2/2" in capsys.readouterr().out) is (rank == 0)


@pytest.mark.parametrize("code", [0, None, 3])
def test_sys_exit_is_an_error(code):
    runtime, model = ready(1)
    with pytest.raises(EarlyExitError, match=rf"sys\.exit\({code}\) was called in model\.fit"):
        model.fit(part(runtime), callbacks=[Leave(SystemExit(code))])


def test_preemption_and_errors_pass():
    runtime, model = ready(1)
    with pytest.raises(Preempted):
        model.fit(part(runtime), callbacks=[Leave(Preempted("x", epoch=0, step=1))])
    with pytest.raises(ZeroDivisionError):
        model.fit(part(runtime), callbacks=[Leave(ZeroDivisionError())])
    with pytest.raises(TypeError, match="nonesuch"):
        model.fit(part(runtime), nonesuch=1)
