"""From what was seen to what is off: each check as a table, nothing measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.doctor.judge import CHECKS, judge
from orchestrator.doctor.report import Clock, Report
from tests.doctor import seen as s

GPU = {"gpus": 2, "gpu_names": ["H100", "H100"], "horovod": s.NCCL}
GPUS = (s.rank(0, **GPU), s.rank(1, **GPU))
SMALL_SHM = replace(s.SHM, total=64 * s.MIB, free=63 * s.MIB)
OTHER = {"Python": "3.11.7", "TensorFlow": "2.20.0", "Keras": "3.15.1"}


def off(seen) -> dict[str, tuple[str, str]]:
    """What is not ok: severity and what was found, by check."""
    return {f.check: (f.severity, f.found) for f in judge(seen) if f.severity != "ok"}


def test_all_is_well():
    findings = judge(s.two(storage=s.STORED))
    assert {finding.severity for finding in findings} == {"ok"}
    assert [finding.check for finding in findings] == [
        *("launch", "versions", "horovod", "gpus", "cpus", "memory", "shm", "nofile", "disk"),
        *("sums", "latency", "bandwidth", "clocks", "storage"),
    ]
    assert all(finding.found and finding.expected for finding in findings)
    assert [finding.todo for finding in findings] == [""] * len(findings)
    assert Report(seen=s.two(), findings=findings).exit_code == 0


def test_alone():
    findings = {finding.check: finding for finding in judge(s.alone())}
    assert {finding.severity for finding in findings.values()} == {"ok"}
    assert "mpi" in findings
    assert not {"sums", "latency", "bandwidth", "clocks", "storage", "nccl"} & set(findings)
    assert "horovodrun -np 2 orchestrator doctor" in findings["launch"].todo
    assert "mpiexec -n 2 orchestrator doctor" in findings["launch"].todo


TABLE = [
    # programs
    (s.two(apart="no NIC"), {"launch": ("problem", "no NIC")}),
    (
        s.two(s.rank(0), s.rank(1, versions=OTHER)),
        {"versions": ("problem", "TensorFlow: 2.21.0 on rank 0; 2.20.0 on rank 1")},
    ),
    (
        s.two(s.rank(0), s.rank(1, horovod=s.BROKEN)),
        {
            "horovod": (
                "problem",
                "0.28.1, built for TensorFlow 2.20.0, does not load: undefined symbol: x on rank 1",
            )
        },
    ),
    (s.two(s.rank(0), s.rank(1, horovod=None), backend="mpi"), {}),
    (
        s.two(s.rank(0, mpi=None), s.rank(1), backend="mpi"),
        {"mpi": ("problem", "not installed on rank 0")},
    ),
    (s.alone(horovod=None), {}),
    (s.alone(mpi=None), {}),
    (
        s.alone(horovod=None, mpi=None),
        {
            "horovod": ("warning", "not installed on rank 0"),
            "mpi": ("warning", "not installed on rank 0"),
        },
    ),
    # devices
    (s.two(*GPUS), {}),
    (
        s.two(GPUS[0], replace(GPUS[1], gpu_names=[])),
        {"gpus": ("problem", "TensorFlow uses 0 of 2 on rank 1")},
    ),
    (
        s.two(*(replace(f, gpus=1, gpu_names=["H100"]) for f in GPUS)),
        {"gpus": ("problem", "1 x H100 for 2 ranks on ranks 0, 1")},
    ),
    (
        s.two(GPUS[0], s.rank(1, horovod=s.NCCL)),
        {"gpus": ("warning", "2 x H100 for 2 ranks on rank 0; none on rank 1")},
    ),
    (
        s.two(*(replace(f, horovod=s.GLOO) for f in GPUS)),
        {"nccl": ("problem", "Horovod without NCCL on ranks 0, 1")},
    ),
    (s.two(*GPUS, backend="mpi"), {"nccl": ("warning", "MPI sums in host memory")}),
    # hosts
    (s.two(s.rank(0, cpus=[0]), s.rank(1, cpus=[1])), {}),
    (
        s.two(s.rank(0, cpus=[0]), s.rank(1, cpus=[0])),
        {"cpus": ("warning", "2 ranks on 1 CPU of node1")},
    ),
    (
        s.two(s.rank(0, cpu_limit=1.5), s.rank(1, cpu_limit=1.5)),
        {"cpus": ("warning", "2 ranks on 1.5 CPUs of node1")},
    ),
    (s.two(s.rank(0), s.rank(1, memory=0)), {}),
    (
        s.two(s.rank(0), s.rank(1, memory=s.GIB)),
        {"memory": ("warning", "512 MiB a rank on rank 1")},
    ),
    (s.two(s.rank(0), s.rank(1, shm=SMALL_SHM)), {}),
    (
        s.two(s.rank(0), s.rank(1, shm=SMALL_SHM), backend="mpi"),
        {"shm": ("warning", "63 MiB free of 64 MiB on rank 1")},
    ),
    (
        s.two(GPUS[0], replace(GPUS[1], shm=None)),
        {"shm": ("warning", "no /dev/shm on rank 1")},
    ),
    (
        s.two(s.rank(0), s.rank(1, limits={"nofile": (1024, 4096)})),
        {"nofile": ("warning", "1024 on rank 1")},
    ),
    (s.two(*(s.rank(r, limits={"nofile": (None, None)}) for r in (0, 1))), {}),
    (
        s.two(s.rank(0), s.rank(1, infiniband=["mlx5_0"])),
        {"memlock": ("warning", "8 MiB on rank 1")},
    ),
    (
        s.two(
            s.rank(0),
            s.rank(
                1, infiniband=["mlx5_0"], limits={"nofile": (8192, 8192), "memlock": (None,) * 2}
            ),
        ),
        {},
    ),
    (
        s.two(s.rank(0, disks=[replace(s.ROOM, free=900 * s.MIB), s.TMP]), s.rank(1)),
        {"disk": ("warning", "900 MiB free at /runs on rank 0")},
    ),
    (
        s.two(s.rank(0), s.rank(1, disks=[s.ROOM, replace(s.TMP, free=5 * s.MIB)])),
        {"disk": ("problem", "5 MiB free at /tmp on rank 1")},
    ),
    (
        s.two(s.rank(0, disks=[replace(s.ROOM, writable=False), s.TMP]), s.rank(1)),
        {"disk": ("problem", "/runs cannot be written on rank 0")},
    ),
    # a run's folder is rank 0's to write
    (s.two(s.rank(0), s.rank(1, disks=[replace(s.ROOM, writable=False), s.TMP])), {}),
    # what was measured
    (
        s.two(collectives=[s.timing("allreduce", 4, 0.01, wrong=[1])]),
        {"sums": ("problem", "wrong on rank 1"), "bandwidth": ("warning", "0 MB/s in summing 4 B")},
    ),
    (
        s.two(
            collectives=[
                s.timing("allreduce", 4, 0.06),
                s.timing("allreduce", 16 * s.MIB, 0.4),
            ]
        ),
        {
            "latency": ("warning", "60 ms to sum 4 B"),
            "bandwidth": ("warning", "42 MB/s in summing 16 MiB"),
        },
    ),
    (
        s.two(clocks=[Clock(rank=r, offset=-2.0 * r, uncertainty=0.01 * r) for r in (0, 1)]),
        {"clocks": ("warning", "-2 s on rank 1, known to ±10 ms")},
    ),
    (s.two(clocks=[Clock(rank=r, offset=2.0 * r, uncertainty=1.5 * r) for r in (0, 1)]), {}),
    (
        s.two(storage=replace(s.STORED, failed="write", error="Forbidden")),
        {"storage": ("problem", "write: Forbidden")},
    ),
    (
        s.two(storage=replace(s.STORED, seconds={"write": 6.0})),
        {"storage": ("warning", "s3://bucket/run, 1 MiB: write 6 s")},
    ),
]


@pytest.mark.parametrize(("seen", "expected"), TABLE)
def test_what_is_off(seen, expected):
    assert off(seen) == expected
    findings = judge(seen)
    assert all(finding.todo for finding in findings if finding.severity != "ok")
    problems = any(severity == "problem" for severity, _ in expected.values())
    assert Report(seen=seen, findings=findings).exit_code == int(problems)


def test_every_check_is_tried():
    tried = {name for _, expected in TABLE for name in expected}
    assert tried == {check.__name__.replace("shared_memory", "shm") for check in CHECKS}


def test_many_ranks_are_not_all_listed():
    ranks = [
        s.rank(r, local_size=1, host=f"n{r}", limits={"nofile": (1000 + r // 12, None)})
        for r in range(100)
    ]
    found = off(replace(s.two(), size=100, ranks=ranks))["nofile"][1]
    assert found == (
        "1000 on ranks 0, 1, 2, 3, 4, 5, 6, 7, 4 more; 1001 on ranks 12, 13, 14, 15, 16, 17, 18, "
        "19, 4 more; 1002 on ranks 24, 25, 26, 27, 28, 29, 30, 31, 4 more; 1003 on ranks 36, 37, "
        "38, 39, 40, 41, 42, 43, 4 more; 5 more"
    )
