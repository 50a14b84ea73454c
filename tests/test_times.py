"""Seconds by what they went into, by a clock of the test's."""

from __future__ import annotations

import time

import pytest
import tensorflow as tf
from tensorflow.python.framework import config as tf_config

from orchestrator.times import Spent, Times
from orchestrator.waits import FIRST_STEP, STEP, Waits


@pytest.fixture
def moment():
    return [100.0]


@pytest.fixture
def waits(moment):
    return Waits(60.0, clock=lambda: moment[0])


def test_own_time_is_what_is_not_waited():
    spent = Spent(10, total=20.0, data=3.0, reduction=5.0, inside=14.0, waiting=2.0)
    assert spent.own == 13.0
    assert spent.between == 4.0


def test_steps_and_waits_are_told_apart(waits, moment):
    times = Times(waits)
    for call, seconds in ((FIRST_STEP, 4.0), (STEP, 1.0), ("allreduce", 0.5), (STEP, 1.0)):
        if call != "allreduce":
            times.begin(1)
        with waits.on(call):
            moment[0] += seconds
        moment[0] += 0.25
    spent = times.take()
    assert spent == Spent(3, total=7.5, data=0.0, reduction=0.0, inside=6.0, waiting=0.5)
    assert times.take() == Spent(0, 0.0, 0.0, 0.0, 0.0, 0.0), "begun anew"


def test_a_wait_within_a_wait_counts_once(waits, moment):
    times = Times(waits)
    with waits.on("barrier"):
        moment[0] += 1.0
        with waits.on("allreduce"):
            moment[0] += 2.0
    assert times.take().waiting == 3.0


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request):
    """As with run.deterministic, where TensorFlow refuses its own clock."""
    if request.param:
        tf.config.experimental.enable_op_determinism()
    yield
    tf_config.disable_op_determinism()


@pytest.mark.usefixtures("deterministic")
def test_the_graph_reads_the_clock(waits):
    """As in a step: data that come late, and a reduction that takes its time."""
    times = Times(waits)

    def late(seconds):
        return lambda x: (time.sleep(seconds), x)[1]

    @tf.function
    def step(x):
        data = tf.numpy_function(late(0.06), [x], tf.float32)
        times.arrived({"x": data})
        own = [2 * data]
        return times.reducing(own, lambda own: [tf.numpy_function(late(0.03), own, tf.float32)])[0]

    times.begin(1)
    step(tf.ones([2]))
    times.take()  # the first call traces
    began = time.monotonic()
    for _ in range(3):
        times.begin(1)
        step(tf.ones([2]))
    spent = times.take()
    assert spent.data >= 0.18
    assert spent.reduction >= 0.09
    assert spent.data + spent.reduction <= time.monotonic() - began


def test_data_of_several_steps_a_call_are_not_told(waits):
    times = Times(waits)
    times.begin(4)
    for _ in range(4):
        times.arrived([tf.zeros([])])
    assert times.take().data == 0.0


def test_data_that_hold_more_than_tensors(waits):
    """As of `train_on_batch` without sample weights."""
    times = Times(waits)

    @tf.function
    def step(x):
        data = {"x": x, "ragged": tf.ragged.constant([[1.0], [2.0, 3.0]]), "weights": None}
        return times.arrived((data, 3))

    data, number = step(tf.constant([1.0, 2.0, 3.0]))
    assert data["x"].numpy().tolist() == [1, 2, 3]
    assert data["ragged"].to_list() == [[1], [2, 3]]
    assert (data["weights"], int(number)) == (None, 3)
    assert times.arrived((None, 3)) == (None, 3)
