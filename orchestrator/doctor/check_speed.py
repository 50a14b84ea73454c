"""Checks of what was measured: sums, latency, bandwidth, clocks, storage."""

from __future__ import annotations

from orchestrator.doctor.report import Finding, Seen, Timing
from orchestrator.doctor.wording import by_rank, finding, of_ranks, seconds, signed, size

# Five times what the slowest sound set-up took: 4 Gloo ranks on 2 cores, 9 ms.
LATENCY_SECONDS = 0.050
# What is left of gigabit Ethernet, the slowest network that anybody would train on.
BUS_BYTES = 100e6
CLOCK_SECONDS = 1.0
STORAGE_SECONDS = 5.0


def sums(seen: Seen) -> Finding | None:
    """A sum that is wrong is worse than none."""
    found = _sums(seen)
    if not found:
        return None
    wrong = sorted({rank for one in found for rank in one.wrong})
    return finding(
        "sums",
        "problem" if wrong else "ok",
        f"wrong on {of_ranks(wrong)}" if wrong else f"exact on all {seen.size} ranks",
        "exact",
        "Do not train with it. Build Horovod, or install MPI, anew on all hosts.",
    )


def latency(seen: Seen) -> Finding | None:
    """The smallest sum: no training step takes less."""
    found = _sums(seen)
    if not found:
        return None
    return finding(
        "latency",
        "warning" if found[0].seconds > LATENCY_SECONDS else "ok",
        f"{seconds(found[0].seconds)} to sum {size(found[0].bytes)}",
        f"{seconds(LATENCY_SECONDS)} or less",
        "Look for other work on the hosts, for more ranks than CPUs, and for an MPI that polls "
        "while it waits: OpenMPI with more ranks than cores took 60-200 ms, Gloo 9 ms.",
    )


def bandwidth(seen: Seen) -> Finding | None:
    """The largest sum."""
    found = _sums(seen)
    if not found:
        return None
    return finding(
        "bandwidth",
        "warning" if found[-1].bus < BUS_BYTES else "ok",
        f"{found[-1].bus / 1e6:.0f} MB/s in summing {size(found[-1].bytes)}",
        f"{BUS_BYTES / 1e6:.0f} MB/s or more",
        "Gigabit Ethernet gives more. Look which network is used (HOROVOD_GLOO_IFACE, "
        "NCCL_SOCKET_IFNAME), what else is on it, and for more ranks than CPUs.",
    )


def clocks(seen: Seen) -> Finding | None:
    """Times of events and the age of leftovers go by them, and S3's signatures."""
    if len(seen.clocks) < 2:
        return None
    off = [c for c in seen.clocks if abs(c.offset) - c.uncertainty > CLOCK_SECONDS]
    worst = max(seen.clocks[1:], key=lambda c: abs(c.offset))
    unsure = max(c.uncertainty for c in seen.clocks)
    told = by_rank([(c.rank, signed(c.offset)) for c in off or [worst]])
    return finding(
        "clocks",
        "warning" if off else "ok",
        f"{told}, known to ±{seconds(unsure)}",
        f"within {seconds(CLOCK_SECONDS)} of rank 0's",
        "Have NTP set the hosts' clocks (chrony, systemd-timesyncd): times in events.jsonl and of "
        "checkpoints are compared, and S3 refuses a clock that is 15 minutes off.",
    )


def storage(seen: Seen) -> Finding | None:
    """Whether a URL can hold checkpoints."""
    found = seen.storage
    if found is None:
        return None
    expected = f"each within {seconds(STORAGE_SECONDS)}"
    if found.error:
        todo = f"No run can write to {found.url}: see to it from rank 0's host, or choose another."
        return finding("storage", "problem", f"{found.failed}: {found.error}", expected, todo)
    slow = any(took > STORAGE_SECONDS for took in found.seconds.values())
    told = ", ".join(f"{step} {seconds(took)}" for step, took in found.seconds.items())
    return finding(
        "storage",
        "warning" if slow else "ok",
        f"{found.url}, {size(found.bytes)}: {told}",
        expected,
        "Checkpoints will be slow. Choose a bucket of the same region, or look at the network.",
    )


def _sums(seen: Seen) -> list[Timing]:
    return sorted((c for c in seen.collectives if c.what == "allreduce"), key=lambda c: c.bytes)
