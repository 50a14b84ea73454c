"""From the launcher's environment to a rank on its own device."""

from __future__ import annotations

import sys

import pytest
import tensorflow as tf

from orchestrator import SettingError, backends, faults
from orchestrator.communicators.watched import WatchedCommunicator
from tests.fakes import FakeCommunicator

LAUNCHERS = ["HOROVOD_RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHERS, "HOROVOD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
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


def test_an_uncaught_exception_ends_the_job(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(faults.signal, "signal", lambda number, handler: None)
    communicator = FakeCommunicator()
    found = faults.Faults(communicator, "test")
    found.record_in(str(tmp_path))

    def abort(code):
        raise SystemExit(code)

    monkeypatch.setattr(communicator, "abort", abort)
    backends.abort_on_exception(found)
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(ValueError, ValueError("x"), None)
    assert ended.value.code == 1
    assert "ValueError: x\nrank 0 (" in capfd.readouterr().err


def joined(monkeypatch, backend: str, size: int, **env: str):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(backends, "connect", lambda name: FakeCommunicator(0, size))
    return backends.join(backend, 30.0)


def test_several_ranks_are_watched(monkeypatch):
    communicator, deadline = joined(monkeypatch, "horovod", 2, HOROVOD_SIZE="2", HOROVOD_RANK="0")
    assert isinstance(communicator, WatchedCommunicator)
    assert deadline is not None
    deadline.stop()
    assert deadline.waits is communicator.waits
    assert deadline.waits.last == "start-up, for all ranks to be there"


def test_one_rank_is_not(monkeypatch):
    communicator, deadline = joined(monkeypatch, "single", 1)
    assert isinstance(communicator, FakeCommunicator)
    assert deadline is None


@pytest.mark.parametrize(
    ("backend", "env", "message"),
    [
        ("horovod", {"PMI_RANK": "1", "PMI_SIZE": "4"}, "built without MPI"),
        ("mpi", {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"}, "mpiexec of the MPI library"),
        ("single", {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"}, "without a launcher"),
    ],
)
def test_ranks_that_would_train_apart(monkeypatch, backend, env, message):
    with pytest.raises(SettingError, match=rf"started 4 ranks.*is of 1: .*{message}"):
        joined(monkeypatch, backend, 1, **env)
