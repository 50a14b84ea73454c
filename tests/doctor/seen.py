"""What the doctor sees where all is well, to change one thing of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.doctor.report import Clock, Facts, Library, Seen, Space, Stored, Timing

MIB, GIB = 2**20, 2**30
GLOO = Library(version="0.28.1", built_for="2.21.0", parts={"gloo": True, "nccl": False})
NCCL = replace(GLOO, parts={"gloo": True, "nccl": True})
BROKEN = Library(version="0.28.1", built_for="2.20.0", error="undefined symbol: x")
MPICH = Library(version="4.1.2", parts={"library": "MPICH 5.0.2", "standard": "5.0"})
ROOM = Space(path="/runs", total=100 * GIB, free=50 * GIB)
TMP = Space(path="/tmp", total=20 * GIB, free=10 * GIB)
SHM = Space(path="/dev/shm", total=16 * GIB, free=8 * GIB)


def rank(number: int = 0, **changed: Any) -> Facts:
    facts = Facts(
        rank=number,
        local_rank=number,
        local_size=2,
        host="node1",
        pid=100 + number,
        versions={"Python": "3.11.7", "TensorFlow": "2.21.0", "Keras": "3.15.1"},
        horovod=GLOO,
        mpi=replace(MPICH, parts={}),
        gpus=0,
        gpu_names=[],
        cpus=[0, 1],
        cpu_limit=None,
        memory=8 * GIB,
        shm=SHM,
        disks=[ROOM, TMP],
        limits={"nofile": (65536, 65536), "memlock": (8 * MIB, 8 * MIB)},
        infiniband=[],
        environment={},
    )
    return replace(facts, **changed)


def timing(what: str, size: int, seconds: float, **changed: Any) -> Timing:
    return Timing(what=what, bytes=size, repeats=5, seconds=seconds, bus=size / seconds, **changed)


def two(*ranks: Facts, **changed: Any) -> Seen:
    """Two ranks on one host, under horovodrun."""
    seen = Seen(
        backend="horovod",
        size=2,
        ranks=list(ranks or (rank(0), rank(1))),
        device="/CPU:0",
        collectives=[
            timing("barrier", 0, 0.001),
            timing("allreduce", 4, 0.001),
            timing("allreduce", 16 * MIB, 0.04),
            timing("broadcast", 16 * MIB, 0.02),
        ],
        clocks=[
            Clock(rank=0, offset=0.0, uncertainty=0.0),
            Clock(rank=1, offset=0.0001, uncertainty=0.0005),
        ],
    )
    return replace(seen, **changed)


def alone(**changed: Any) -> Seen:
    """One process without a launcher."""
    facts = rank(0, local_size=1, mpi=MPICH)
    return replace(Seen(backend="single", size=1, ranks=[replace(facts, **changed)]))


STORED = Stored(
    url="s3://bucket/run",
    bytes=MIB,
    seconds={"write": 0.1, "read": 0.05, "list": 0.01, "delete": 0.01},
)
