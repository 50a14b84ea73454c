"""From the launcher's environment to a connected rank on its own device."""

from __future__ import annotations

import contextlib
import faulthandler
import glob
import os
import sys
from typing import Any

import tensorflow as tf

from orchestrator.communicators.base import Communicator
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.communicators.watched import WatchedCommunicator
from orchestrator.config import SettingError
from orchestrator.deadline import Deadline
from orchestrator.faults import Faults
from orchestrator.waits import START, Waits

_ALONE = "Start it without a launcher, or leave the backend at auto."
_REMEDY = {
    "single": _ALONE,
    "mirrored": _ALONE,
    "horovod": (
        "This Horovod is built without MPI and knows only the ranks of horovodrun: start it by "
        "horovodrun -np, or under mpiexec with backend='mpi'."
    ),
    "mpi": (
        "Start it by the mpiexec of the MPI library that mpi4py loads (of the wheel mpich, the one "
        "beside this Python), or under horovodrun with backend='horovod'."
    ),
}
_MARGIN_SECONDS = 2.0
_MPI_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def detect(gpus: int) -> str:
    """The backend that the launcher's environment variables ask for."""
    if "HOROVOD_RANK" in os.environ:
        return "horovod"
    if any(name in os.environ for name in _MPI_VARIABLES):
        return "mpi"
    return "mirrored" if gpus > 1 else "single"


def launched_rank() -> int:
    """This process's rank as its launcher's environment says, before anything is initialised."""
    names = ("HOROVOD_RANK", *_MPI_VARIABLES)
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def launched_local_rank() -> int:
    """The same, of its number on its host."""
    names = ("HOROVOD_LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def launched_size() -> int | None:
    """How many ranks the launcher started, where its environment says."""
    names = ("HOROVOD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def visible_gpus() -> int:
    """How many GPUs this process may use, found without touching CUDA."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(glob.glob("/dev/nvidia[0-9]*"))
    if allowed is None:
        return present
    return min(present, len([d for d in allowed.split(",") if d.strip() not in ("", "-1")]))


def connect(backend: str) -> Communicator:
    """Joins the ranks; the backend's library is imported here and nowhere else.

    Raises:
        ImportError: It is missing; the message says what to install.
    """
    if backend == "horovod":
        from orchestrator.communicators.horovod import HorovodCommunicator

        return HorovodCommunicator()
    if backend == "mpi":
        from orchestrator.communicators.mpi import MPICommunicator

        return MPICommunicator()
    return SingleCommunicator()


def join(backend: str, timeout: float) -> tuple[Communicator, Deadline | None]:
    """Joins the ranks, with a deadline on every wait from here on where there are several.

    Raises:
        ImportError: The backend's library is missing; the message says what to install.
        SettingError: The launcher started several ranks, and the backend is not of its kind.
    """
    size, waits = launched_size(), Waits(timeout)
    deadline = Deadline(waits, f"rank {launched_rank()} of {size or 'some'}")
    if detect(0) != "single":
        deadline.start()
        # MPI_Init keeps Python's lock while it waits, so that no thread could speak.
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr that is no file
            faulthandler.dump_traceback_later(START * timeout + _MARGIN_SECONDS, exit=True)
    try:
        with waits.on("start-up, for all ranks to be there"):
            communicator = connect(backend)
    except BaseException:
        deadline.stop()
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    if size is not None and size != communicator.size:
        deadline.stop()
        raise SettingError(
            f"The launcher started {size} ranks, and with backend={backend!r} this one is of "
            f"{communicator.size}: they would train apart. {_REMEDY[backend]}"
        )
    if communicator.size == 1:
        deadline.stop()
        return communicator, None
    return WatchedCommunicator(communicator, waits), deadline


def pin_gpu(gpus: int, communicator: Communicator) -> None:
    """Leaves this rank the GPU of its local rank, or with no GPU hides them from TensorFlow.

    Raises:
        SettingError: On every rank of a host that has more ranks than visible GPUs.
    """
    if gpus == 0:
        # TensorFlow itself would look for a driver at its first operation.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        return
    devices = tf.config.list_physical_devices("GPU")
    if communicator.size > 1:
        if communicator.local_size > len(devices):
            raise SettingError(
                f"This host has {len(devices)} visible GPU(s) and {communicator.local_size} ranks: "
                "start at most one rank a GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES=-1 to "
                "train on the CPU."
            )
        devices = [devices[communicator.local_rank]]
        tf.config.set_visible_devices(devices, "GPU")
    for device in devices:
        tf.config.experimental.set_memory_growth(device, True)


def mirror(gpus: int, replicas: int | None) -> tf.distribute.Strategy:
    """A MirroredStrategy over the GPUs, or over logical CPU devices where there is none.

    Raises:
        SettingError: More replicas than visible GPUs.
    """
    if gpus:
        count = gpus if replicas is None else replicas
        if count > gpus:
            raise SettingError(f"replicas={count} is not allowed: {gpus} GPU(s) are visible.")
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(count)])
    count = replicas or 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def abort_on_exception(faults: Faults) -> None:
    """An exception nobody catches on one rank ends the job, so that the others don't wait.

    A crash, such as a segmentation fault, shows where in Python it came from.
    """

    def hook(kind: Any, value: BaseException, traceback: Any) -> None:
        faults.fail(value)

    sys.excepthook = hook
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError):  # stderr that is no file
            faulthandler.enable()
