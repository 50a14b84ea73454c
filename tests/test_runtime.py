"""`init`, the `Runtime` it returns, and how rank 0's outcome reaches the others."""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import orchestrator
from orchestrator import SettingError, backends
from orchestrator import runtime as runtimes
from orchestrator.agreement import RankError
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.optimizer import is_distributed
from orchestrator.runtime import Runtime, current
from tests.fakes import FakeCommunicator

LAUNCHERS = ["HOROVOD_RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"]


def on(communicator: Any, **options: Any) -> Runtime:
    return Runtime(communicator, **options)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh():
    """`init` was not called before, nor after."""
    assert runtimes._default is None
    yield
    runtimes.current().close()
    assert runtimes._default is None


def test_init_in_one_process(fresh):
    runtime = orchestrator.init(seed=5)
    place = (runtime.rank, runtime.size, runtime.local_rank, runtime.replicas)
    assert place == (0, 1, 0, 1)
    assert runtime.is_root
    assert (runtime.backend, runtime.seed, runtime.strategy) == ("single", 5, None)
    assert current() is runtime
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1", "the CPU path does not touch CUDA"
    with runtime.scope() as nothing:
        assert nothing is None


def test_init_seeds_everything(fresh):
    drawn = []
    for _ in range(2):
        orchestrator.init("single", seed=9).close()
        layer = keras.layers.Dense(2)
        layer.build((None, 2))
        drawn.append(
            (
                random.random(),
                float(np.random.random()),
                float(tf.random.uniform(()).numpy()),
                layer.kernel.numpy().tobytes(),
            )
        )
    assert drawn[0] == drawn[1]


def test_without_a_seed_one_is_drawn(fresh):
    seeds = set()
    for _ in range(3):
        runtime = orchestrator.init("single")
        seeds.add(runtime.seed)
        runtime.close()
    assert len(seeds) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_init_twice(fresh):
    orchestrator.init("single")
    with pytest.raises(RuntimeError, match=r"called before.*backend='single'"):
        orchestrator.init()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "nccl"}, r"'nccl' is unknown\. Allowed: auto, horovod, mpi, mirrored, single"),
        ({"replicas": 4}, r"replicas=4 with backend='single'"),
        ({"backend": "mirrored", "replicas": 0}, "1 or more"),
        ({"gradient_buckets": 0}, "gradient_buckets=0"),
    ],
)
def test_init_refuses(fresh, arguments, message):
    with pytest.raises(SettingError, match=message):
        orchestrator.init(**arguments)
    assert runtimes._default is None, "it can be called again, right"


def test_current_is_of_the_thread():
    one, two = on(SingleCommunicator()), on(SingleCommunicator())
    seen = []
    with one.use():
        assert current() is one
        with two.use():
            assert current() is two
        assert current() is one
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen[0] not in (one, two)
    assert current() not in (one, two)
    assert current().size == 1


def test_on_root_runs_there_and_tells_all():
    ran = []
    communicator = FakeCommunicator(0, 2)
    on(communicator).on_root(lambda: ran.append(0))
    assert communicator.calls == ["broadcast_object"]
    on(FakeCommunicator(1, 2)).on_root(lambda: ran.append(1))
    assert ran == [0]


def test_on_all_gives_each_rank_its_own_result():
    communicator = FakeCommunicator(1, 2)
    assert on(communicator).on_all(lambda: "mine") == "mine"
    assert communicator.calls == ["allgather_object"]


@pytest.mark.parametrize("kind", [SettingError, OSError])
def test_on_all_raises_everywhere_what_one_rank_raised(kind):
    """Rank 1 of 3 fails: it raises its own, the others what it told, and none goes on alone."""
    told: list[Any] = []

    def fail():
        raise kind("no such module")

    def everyone(mine):
        told.append(mine)
        return [None, mine, None]

    with pytest.raises(kind, match=r"^no such module$"):
        on(FakeCommunicator(1, 3, gather=everyone)).on_all(fail)
    here = on(FakeCommunicator(0, 3, gather=lambda mine: [mine, told[0], None]))
    elsewhere = SettingError if kind is SettingError else RankError
    with pytest.raises(elsewhere, match=r"no such module$" if kind is SettingError else "Rank 1"):
        here.on_all(lambda: "fine")


def test_on_root_raises_everywhere():
    told: list[Any] = []

    class Root(FakeCommunicator):
        def broadcast_object(self, obj, root=0):
            told.append(obj)
            return obj

    def fail(error: Exception):
        def function():
            raise error

        return function

    with pytest.raises(OSError, match="disk full"):
        on(Root()).on_root(fail(OSError("disk full")))
    with pytest.raises(SettingError, match="wrong name"):
        on(Root()).on_root(fail(SettingError("wrong name")))
    disk, name = (on(FakeCommunicator(1, 2, broadcast=lambda _, m=m: m)) for m in told)
    with pytest.raises(RankError, match="Rank 0 failed: disk full"):
        disk.on_root(lambda: None)
    with pytest.raises(SettingError, match=r"^wrong name$"):
        name.on_root(lambda: None)


def test_only_the_root_speaks(capsys):
    root, other = on(FakeCommunicator(0, 2)), on(FakeCommunicator(1, 2))
    for runtime in (root, other):
        runtime.say("hello")
        runtime.say_once("once")
        runtime.say_once("once")
    assert capsys.readouterr().out == "hello\nonce\n"


def build() -> keras.Model:
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def test_what_a_script_uses():
    communicator = FakeCommunicator()
    runtime = on(communicator, gradient_buckets=3)
    model = build()
    assert runtime.distribute(model.optimizer) is model.optimizer
    assert is_distributed(model.optimizer)
    assert model.optimizer.apply.reduction.buckets == 3
    runtime.broadcast(model)
    runtime.broadcast(model)
    assert communicator.calls == ["broadcast", "broadcast"], "as often as it is asked"
    part = runtime.shard((np.zeros((8, 2)), np.zeros((8, 1))), batch_size=4)
    assert [x.shape for x, _ in part.as_numpy_iterator()] == [(2, 2), (2, 2)]


def test_the_runtimes_seed_orders_the_shuffle():
    orders = []
    for seed in (1, 1, 2):
        part = on(SingleCommunicator(), seed=seed).shard(np.arange(30), batch_size=30, shuffle=True)
        orders.append(next(iter(part.as_numpy_iterator())).tolist())
    assert orders[0] == orders[1] != orders[2]


def test_evaluate_gives_global_results():
    """The other rank saw four samples, with no error."""
    x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
    model = build()
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    communicator = FakeCommunicator(reduce=lambda flat: flat * np.tile([1, 2], flat.size // 2))
    with on(communicator).use():
        result = orchestrator.evaluate(model, (x, y)[0], y=y)
    assert result == pytest.approx({k: v / 2 for k, v in expected.items()}, rel=1e-6)
    assert communicator.calls == ["allreduce"]


def test_evaluate_in_one_process_is_keras():
    model = build()
    x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert orchestrator.evaluate(model, x, y=y) == expected


def test_ranks_that_another_host_has_no_gpu_for(fresh, monkeypatch):
    """Rank 0, whose own host has enough, refuses as well instead of waiting for the others."""
    told = (True, "This host has 1 visible GPU(s) and 2 ranks")
    others = FakeCommunicator(0, 4, gather=lambda mine: [mine, None, told, told])
    monkeypatch.setattr(backends, "join", lambda backend, timeout: (others, None))
    with pytest.raises(SettingError, match="1 visible GPU"):
        orchestrator.init("horovod")
