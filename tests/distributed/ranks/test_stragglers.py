"""A rank that is slow is named by all, with what its time went into."""

from __future__ import annotations

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator import callbacks
from tests.distributed import problems
from tests.distributed.rank_plugin import three
from tests.fakes import Recorder

PAUSE = 0.05
STEPS = 40


def pause(value):
    time.sleep(PAUSE)
    return value


class Slow(keras.layers.Layer):
    """The identity, which takes its time."""

    def call(self, inputs):
        paused = tf.numpy_function(pause, [inputs], inputs.dtype)
        paused.set_shape(inputs.shape)
        # Once a step is enough: not in the backward pass.
        return inputs + tf.stop_gradient(paused - inputs)


class Pausing(keras.callbacks.Callback):
    """Takes its time after each step: `PAUSE` after the first `steps`, `then` after the rest."""

    def __init__(self, steps: int, then: float) -> None:
        super().__init__()
        self.steps, self.then = steps, then

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(PAUSE if batch < self.steps else self.then)


def fit(runtime, part_of_time, *, slow, steps=STEPS, others=0.0):
    """Trains with `slow` ranks that spend their time there, and says what was recorded.

    Between steps `slow` ones pause for the first `steps`; then, and all other ranks, for `others`.
    """
    mine = runtime.rank in slow
    inputs = keras.Input((1,))
    hidden = Slow()(inputs) if mine and part_of_time == "compute" else inputs
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(runtime.distribute(keras.optimizers.SGD(0.01)), "mse")
    runtime.broadcast(model)
    targets = np.ones(STEPS * 2 * runtime.size)
    part = runtime.shard(problems.points(targets), batch_size=2 * runtime.size)
    if mine and part_of_time == "data":
        part = part.map(
            lambda x, y: (tf.ensure_shape(tf.numpy_function(pause, [x], x.dtype), [None, 1]), y)
        )
    own = [callbacks.Stragglers(seconds=0.1)]
    if part_of_time == "between":
        own.append(Pausing(steps if mine else 0, others))
    model.fit(part, epochs=1, verbose=0, callbacks=own)
    return runtime.events.events


@pytest.fixture
def recorder(runtime, monkeypatch):
    made = Recorder()
    monkeypatch.setattr(runtime, "events", made)
    return made


@three
@pytest.mark.parametrize("part_of_time", ["between", "data", "compute"])
def test_a_slow_rank_is_named(runtime, communicator, recorder, part_of_time, capfd):
    last = runtime.size - 1
    events = fit(runtime, part_of_time, slow=[last])
    (slow,) = [e for e in events if e["kind"] == "slow"]
    assert (slow["rank"], slow["epoch"]) == (last, 0)
    assert slow["own"] > 0.5 * PAUSE  # of the data some are there before they are asked for
    assert slow[part_of_time] > 0.5 * PAUSE
    others = {"between", "data", "compute"} - {part_of_time}
    assert all(slow[name] < 0.5 * slow[part_of_time] for name in others)
    (times,) = [e for e in events if e["kind"] == "times"]
    assert times["own"].index(max(times["own"])) == last
    assert all(wait > 0.4 * PAUSE for wait in times["reduction"][:last]), "they wait in each step"
    assert times["reduction"][last] < 0.5 * PAUSE
    said = f"Rank {last} is slow: its own work takes"
    assert (said in capfd.readouterr().out) == runtime.is_root
    assert communicator.allgather_object(events) == [events] * runtime.size


@three
def test_a_rank_that_catches_up_is_named_no_more(runtime, recorder, capfd):
    fit(runtime, "between", slow=[0], steps=12, others=PAUSE / 4)
    said = capfd.readouterr().out
    assert recorder.kinds().count("slow") == 1
    assert said.count("Rank 0 is slow") == int(runtime.is_root)
    assert said.count("Rank 0 is no longer slower than the others.") == int(runtime.is_root)


@three
def test_ranks_that_are_alike_are_not_named(runtime, recorder):
    """All as slow: far above what a busy machine adds to one of them."""
    fit(runtime, "between", slow=range(runtime.size))
    assert recorder.kinds() == ["times"]
