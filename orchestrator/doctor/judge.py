"""All checks: pure functions from what was seen to what is off. docs/doctor.md says why each."""

from __future__ import annotations

from orchestrator.doctor import check_hosts, check_programs, check_speed
from orchestrator.doctor.report import Finding, Seen

CHECKS = (
    check_programs.launch,
    check_programs.versions,
    check_programs.horovod,
    check_programs.mpi,
    check_programs.gpus,
    check_programs.nccl,
    check_hosts.cpus,
    check_hosts.memory,
    check_hosts.shared_memory,
    check_hosts.nofile,
    check_hosts.memlock,
    check_hosts.disk,
    check_speed.sums,
    check_speed.latency,
    check_speed.bandwidth,
    check_speed.clocks,
    check_speed.storage,
)


def judge(seen: Seen) -> list[Finding]:
    """What each check that has something to look at finds, in this order."""
    return [finding for check in CHECKS if (finding := check(seen)) is not None]
