"""A rank that dies, hangs or differs ends the job, in time and with its cause; in short.

The whole table: `python -m tests.distributed.faults`.
"""

from __future__ import annotations

import pytest

from tests.distributed import faults

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("backend", "fault", "rank"),
    [
        ("horovod", "SIGKILL", 0),
        ("horovod", "SIGSTOP", 1),
        ("horovod", "sys.exit(0)", 1),
        ("mpi", "exception", 1),
        ("mpi", "hang", 0),
        ("mpi", "other settings", 1),
        ("mpi", "slow", 0),
    ],
)
def test_a_fault_is_told_and_ends_the_job(backend, fault, rank, tmp_path):
    seen = faults.provoke(backend, 2, fault, rank, tmp_path)
    assert not seen.problem, f"{seen.problem}\n{seen.output}"
    print(f"{fault} on rank {rank} under {backend}: ended after {seen.seconds:.1f} s")
    notes = sorted(path.name for path in (tmp_path / "run" / "faults").glob("rank-*"))
    if fault in faults.SLOW:
        assert seen.outcome["exit_code"] == 70
        assert f"rank {rank}" in seen.outcome["reason"]
        assert notes == (["rank-0.txt", "rank-1.txt"] if fault == "hang" else ["rank-0.txt"])
    elif fault in ("exception", "sys.exit(0)"):
        assert seen.outcome["exit_code"] == 1
        assert seen.outcome["reason"].startswith(f"rank {rank} ("), "not rank 0's lost connection"
        assert notes == []
