"""What one rank knows about itself: versions, devices, libraries, and its host. Silent."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import socket
import sys
import tempfile

from orchestrator import backends
from orchestrator.communicators import horovod, mpi
from orchestrator.communicators.base import Communicator
from orchestrator.doctor import host
from orchestrator.doctor.report import Facts, Library


def of_this_rank(communicator: Communicator, backend: str, folder: str) -> Facts:
    """Looks around; on every rank, after it has joined, and before its GPU is chosen.

    Does not communicate. What cannot be read is left out, or said in its place.

    Args:
        communicator: The ranks.
        backend: The one in use, whose library is loaded. `"single"` and `"mirrored"` load both
            Horovod and mpi4py, to see whether they would.
        folder: Whose disk is looked at.
    """
    gpus = backends.visible_gpus()
    return Facts(
        rank=communicator.rank,
        local_rank=communicator.local_rank,
        local_size=communicator.local_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        versions=versions(),
        horovod=_horovod(load=backend != "mpi"),
        mpi=_mpi(load=backend != "horovod"),
        gpus=gpus,
        gpu_names=_gpu_names() if gpus else [],
        cpus=host.cpus(),
        cpu_limit=host.cpu_limit(),
        memory=host.memory(),
        shm=host.shared_memory(),
        disks=[host.space(folder), host.space(tempfile.gettempdir())],
        limits=host.limits(),
        infiniband=host.infiniband(),
        environment=host.environment(os.environ),
    )


def versions() -> dict[str, str]:
    """Of what a training computes with: alike on all ranks, or they compute something else."""
    import keras
    import numpy as np
    import tensorflow as tf

    package = sys.modules["orchestrator"]
    return {
        "Python": platform.python_version(),
        "TensorFlow": str(tf.__version__),
        "Keras": str(keras.__version__),
        "NumPy": str(np.__version__),
        "keras-orchestrator": str(package.__version__),
    }


def _horovod(load: bool) -> Library | None:
    found = horovod.installed()
    if found is None:
        return None
    library = Library(version=found["version"], built_for=found["tensorflow"])
    if not load:  # one built with MPI would load an MPI library beside mpi4py's
        return library
    try:
        return dataclasses.replace(library, parts=horovod.build())
    except ImportError as error:
        return dataclasses.replace(library, error=str(error.__cause__ or error))


def _mpi(load: bool) -> Library | None:
    try:
        library = Library(version=importlib.metadata.version("mpi4py"))
    except importlib.metadata.PackageNotFoundError:
        return None
    if not load:
        return library
    try:
        return dataclasses.replace(library, parts=mpi.build())
    except ImportError as error:
        return dataclasses.replace(library, error=str(error.__cause__ or error))


def _gpu_names() -> list[str]:
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(device) for device in found]
    return [str(one.get("device_name", "GPU")) for one in details]
