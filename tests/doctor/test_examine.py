"""Where sums are measured, and what happens where a library does not load."""

from __future__ import annotations

import pytest
import tensorflow as tf

from orchestrator import SettingError, backends
from orchestrator.communicators import horovod
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.doctor import examine, facts
from tests.doctor import seen as s
from tests.fakes import FakeCommunicator

H100 = {"gpus": 2, "gpu_names": ["H100", "H100"]}


@pytest.mark.parametrize(
    ("ranks", "device", "pinned", "hidden"),
    [
        ((s.rank(0), s.rank(1)), "/CPU:0", [0], []),
        ((s.rank(0, **H100), s.rank(1, **H100)), "/GPU:0", [2], []),
        # too few, or not everywhere: what TensorFlow can see is hidden from it
        ((s.rank(0, **H100), s.rank(1, gpus=1, gpu_names=["H100"])), "/CPU:0", [], [([], "GPU")]),
        ((s.rank(0), s.rank(1, **H100)), "/CPU:0", [], [([], "GPU")]),
        ((s.rank(0, **H100), s.rank(1)), "/CPU:0", [0], []),
    ],
)
def test_where_sums_are_measured(monkeypatch, ranks, device, pinned, hidden):
    pins, hides = [], []
    monkeypatch.setattr(backends, "pin_gpu", lambda gpus, communicator: pins.append(gpus))
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *call: hides.append(call))
    assert examine._place(FakeCommunicator(1, 2), list(ranks)) == device
    assert (pins, hides) == (pinned, hidden)


def test_bad_words():
    with pytest.raises(SettingError, match="--backend nccl is unknown"):
        examine.examine("nccl", None, ".")


def of_this_rank(monkeypatch, **patched):
    for name, function in patched.items():
        monkeypatch.setattr(horovod, name, function)
    # under Horovod mpi4py is not loaded: this process may need it
    return facts.of_this_rank(SingleCommunicator(), "horovod", ".")


def test_horovod_that_does_not_load(monkeypatch):
    def build():
        raise ImportError("what to do") from OSError("undefined symbol: x")

    installed = {"version": "0.28.1", "tensorflow": "2.20.0"}
    found = of_this_rank(monkeypatch, installed=lambda: installed, build=build).horovod
    assert found is not None
    assert (found.version, found.built_for) == ("0.28.1", "2.20.0")
    assert (found.error, found.parts) == ("undefined symbol: x", {})


def test_no_horovod(monkeypatch):
    found = of_this_rank(monkeypatch, installed=lambda: None)
    assert found.horovod is None
    assert found.mpi is not None
    assert found.mpi.parts == {}


def test_ranks_that_cannot_join(monkeypatch):
    def join(backend, timeout):
        raise RuntimeError("no NIC")

    monkeypatch.setattr(backends, "join", join)
    monkeypatch.setenv("HOROVOD_RANK", "3")
    monkeypatch.setenv("HOROVOD_SIZE", "4")
    found = examine.examine("horovod", "memory://doctor/never", ".")
    assert (found.rank, found.exit_code) == (3, 1)
    assert (found.seen.size, found.seen.apart, found.seen.storage) == (4, "no NIC", None)
    assert [facts.rank for facts in found.seen.ranks] == [3]
