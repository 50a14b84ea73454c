"""From the launcher's environment to a rank on its own device."""

from __future__ import annotations

import pytest
import tensorflow as tf

from orchestrator import SettingError, backends
from tests.fakes import FakeCommunicator

LAUNCHERS = ["HOROVOD_RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("names", "gpus", "backend"),
    [
        ([], 0, "single"),
        ([], 1, "single"),
        ([], 2, "mirrored"),
        (["HOROVOD_RANK"], 0, "horovod"),
        (["HOROVOD_RANK"], 8, "horovod"),
        (["PMI_RANK"], 0, "mpi"),
        (["PMIX_RANK"], 4, "mpi"),
        (["OMPI_COMM_WORLD_RANK"], 0, "mpi"),
        (["HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"], 0, "horovod"),  # horovodrun over MPI
    ],
)
def test_detect(monkeypatch, names, gpus, backend):
    for name in names:
        monkeypatch.setenv(name, "0")
    assert backends.detect(gpus) == backend


@pytest.mark.parametrize("name", [None, *LAUNCHERS])
def test_launched_rank(monkeypatch, name):
    if name:
        monkeypatch.setenv(name, "3")
    assert backends.launched_rank() == (3 if name else 0)


@pytest.mark.parametrize(
    ("devices", "allowed", "count"),
    [(0, None, 0), (4, None, 4), (4, "", 0), (4, "-1", 0), (4, "0,2", 2), (1, "0,1,2", 1)],
)
def test_visible_gpus(monkeypatch, devices, allowed, count):
    found = [f"/dev/nvidia{i}" for i in range(devices)]
    monkeypatch.setattr(backends.glob, "glob", lambda pattern: found)
    if allowed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert backends.visible_gpus() == count


def test_more_local_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"])
    with pytest.raises(SettingError, match=r"1 visible GPU\(s\) and 2 ranks.*CUDA_VISIBLE"):
        backends.pin_gpu(1, FakeCommunicator(1, 2))


def test_each_rank_takes_its_gpu(monkeypatch):
    chosen, grown = [], []
    devices = ["GPU:0", "GPU:1", "GPU:2"]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: devices)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda d, kind: chosen.append(d))
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda d, on: grown.append((d, on))
    )
    backends.pin_gpu(3, FakeCommunicator(2, 3))
    assert chosen == [["GPU:2"]]
    assert grown == [("GPU:2", True)]


def test_an_uncaught_exception_ends_the_job(monkeypatch):
    ended, printed = [], []
    monkeypatch.setattr(backends.sys, "excepthook", lambda *error: printed.append(error))
    communicator = FakeCommunicator()
    monkeypatch.setattr(communicator, "abort", ended.append)
    backends.abort_on_exception(communicator)
    error = ValueError("x")
    backends.sys.excepthook(ValueError, error, None)
    assert ended == [1]
    assert printed == [(ValueError, error, None)], "its traceback is shown first"
