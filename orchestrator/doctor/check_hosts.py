"""Checks of what the ranks' hosts give them: CPUs, memory, shared memory, disks, limits."""

from __future__ import annotations

import math

from orchestrator.doctor.report import Facts, Finding, Seen, Severity, Space
from orchestrator.doctor.wording import (
    at_least,
    by_rank,
    count,
    finding,
    limit,
    of_each,
    size,
    some,
)

MIB, GIB = 2**20, 2**30
NOFILE = 4096
RANK_MEMORY = GIB  # a rank that has done nothing but import TensorFlow takes half of that
SHM_GPU, SHM_MPI = GIB, 64 * MIB
DISK_LITTLE, DISK_NOTHING = GIB, 100 * MIB


def cpus(seen: Seen) -> Finding:
    """Ranks that share cores wait for each other's turn in each collective."""
    counts = {host: _cpus([f for f in seen.ranks if f.host == host]) for host in seen.hosts}
    sizes = {f.host: f.local_size for f in seen.ranks}
    short = [host for host in counts if counts[host] < sizes[host] and sizes[host] > 1]
    told = [
        f"{count(sizes[host], 'rank')} on {count(counts[host], 'CPU')} of {host}"
        for host in short or counts
    ]
    return finding(
        "cpus",
        "warning" if short else "ok",
        some(told, 4, "; "),
        "one a rank or more",
        "They share them, and each step waits for the last: start fewer ranks there, or give it "
        "more CPUs.",
    )


def memory(seen: Seen) -> Finding:
    """What is there for each rank."""

    def each(facts: Facts) -> float:
        return (facts.memory or math.inf) / max(facts.local_size, 1)

    return at_least(
        "memory",
        seen.ranks,
        each,
        RANK_MEMORY,
        lambda f: f"{size(each(f))} a rank" if f.memory else "unknown",
        f"{size(RANK_MEMORY)} a rank or more",
        "Start fewer ranks on that host, or raise the container's limit (kubernetes.memory).",
    )


def shared_memory(seen: Seen) -> Finding:
    """NCCL and MPI send through /dev/shm between the ranks of a host."""
    needed = SHM_GPU if any(f.gpus for f in seen.ranks) else 0
    needed = needed or (SHM_MPI if seen.backend == "mpi" else 0)
    return at_least(
        "shm",
        seen.ranks,
        lambda f: f.shm.free if f.shm else 0,
        needed,
        lambda f: f"{size(f.shm.free)} free of {size(f.shm.total)}" if f.shm else "no /dev/shm",
        f"{size(needed)} free or more" if needed else "any: not used",
        "Docker gives 64 MiB: start it with --shm-size=2g. On Kubernetes mount an emptyDir of "
        "medium Memory at /dev/shm (kubernetes.shm does).",
    )


def nofile(seen: Seen) -> Finding:
    """A rank has sockets to others beside its files and its connections to storage."""

    def soft(facts: Facts) -> float:
        found = facts.limits["nofile"][0]
        return math.inf if found is None else found

    return at_least(
        "nofile",
        seen.ranks,
        soft,
        NOFILE,
        lambda f: limit(f.limits["nofile"][0]),
        f"{NOFILE} or more",
        f"Run `ulimit -n {NOFILE}` before the launcher, on every host; for a container set it "
        "where that is started.",
    )


def memlock(seen: Seen) -> Finding | None:
    """RDMA pins the memory that it sends."""
    ranks = [f for f in seen.ranks if f.infiniband]
    if not ranks:
        return None
    short = [f for f in ranks if f.limits["memlock"][0] is not None]
    return finding(
        "memlock",
        "warning" if short else "ok",
        of_each(short, lambda f: f"{size(f.limits['memlock'][0] or 0)}") or "unlimited",
        "unlimited, for RDMA",
        "Run `ulimit -l unlimited` before the launcher, on every host.",
    )


def disk(seen: Seen) -> Finding:
    """Where rank 0 would write a run, and every rank's folder of temporary files."""
    # The other ranks write little more into run.dir than their last words.
    spaces = [(f.rank, one) for f in seen.ranks for one in (f.disks if not f.rank else f.disks[1:])]
    todo = "Choose another folder with --dir (run.dir) and TMPDIR, or "
    closed = [(rank, f"{one.path} cannot be written") for rank, one in spaces if not one.writable]
    expected = f"{size(DISK_LITTLE)} free or more"
    if closed:
        return finding("disk", "problem", by_rank(closed), expected, f"{todo}let this user write.")
    least = min((one for _, one in spaces), key=lambda one: one.free)
    short = [(rank, _free(one)) for rank, one in spaces if one.free < DISK_LITTLE]
    severity: Severity = "warning" if short else "ok"
    severity = "problem" if least.free < DISK_NOTHING else severity
    found = by_rank(short) if short else _free(least)
    return finding("disk", severity, found, expected, f"{todo}make room.")


def _free(space: Space) -> str:
    return f"{size(space.free)} free at {space.path}"


def _cpus(ranks: list[Facts]) -> float:
    """What the ranks of a host may use together: launchers bind ranks to CPUs of their own."""
    together = len({number for facts in ranks for number in facts.cpus})
    return min([together, *(f.cpu_limit for f in ranks if f.cpu_limit is not None)])
