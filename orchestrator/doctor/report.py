"""What the doctor has seen, and what it makes of it: plain data, as `--json` shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["ok", "warning", "problem"]
Limit = int | None  # None where there is no limit
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Space:
    """A filesystem, by a folder on it. Bytes."""

    path: str
    total: int
    free: int
    writable: bool = True


@dataclass(frozen=True, kw_only=True)
class Library:
    """What ranks talk through.

    Attributes:
        version: Of the Python package.
        built_for: The TensorFlow that it was compiled for; nothing where that is not said.
        error: Why it does not load; nothing if it does, or was not tried.
        parts: What it was built with, or what it loads; empty if it was not loaded.
    """

    version: str
    built_for: str = ""
    error: str = ""
    parts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one rank knows about itself and its host.

    Attributes:
        gpus: How many GPUs it may use, by their device files and CUDA_VISIBLE_DEVICES.
        gpu_names: Those that TensorFlow can use.
        cpus: The numbers of the CPUs it may run on.
        cpu_limit: How many CPUs its cgroup gets at once; `None` without a limit.
        memory: Bytes of the host, or of its cgroup where that is less.
        shm: `/dev/shm`; `None` where there is none.
        disks: Where a run would write, and the folder of temporary files.
        limits: The soft and the hard limit of each kind; `None` for unlimited.
        infiniband: Devices of RDMA networks.
        environment: Variables that change how ranks talk or which devices they use.
    """

    rank: int
    local_rank: int
    local_size: int
    host: str
    pid: int
    versions: dict[str, str]
    horovod: Library | None
    mpi: Library | None
    gpus: int
    gpu_names: list[str]
    cpus: list[int]
    cpu_limit: float | None
    memory: int
    shm: Space | None
    disks: list[Space]
    limits: dict[str, tuple[Limit, Limit]]
    infiniband: list[str]
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One collective at one size.

    Attributes:
        what: `barrier`, `allreduce` or `broadcast`.
        bytes: On each rank.
        repeats: How often it was timed, after two that were not.
        seconds: The median of the slowest rank.
        bus: Bytes a second through the slowest link: `2 (n - 1) / n` times the bytes for an
            allreduce, over the seconds (https://github.com/NVIDIA/nccl-tests, PERFORMANCE.md).
        wrong: Ranks whose sum was not what it must be.
    """

    what: str
    bytes: int
    repeats: int
    seconds: float
    bus: float
    wrong: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A rank's clock beside rank 0's: ahead by `offset` seconds, known to `uncertainty`."""

    rank: int
    offset: float
    uncertainty: float


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What was tried at a URL.

    Attributes:
        bytes: Of the object.
        seconds: Of each step that succeeded: write, read, list, delete.
        failed: The step that did not; nothing if all did.
        error: What was said then, or is wrong with what came back.
    """

    url: str
    bytes: int
    seconds: dict[str, float]
    failed: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Everything that `judge` looks at.

    Attributes:
        backend: The one in use.
        size: How many ranks there are.
        device: Where the sums were measured; nothing where none was.
        apart: Why the ranks could not join; then only rank 0 is known, and nothing was measured.
    """

    backend: str
    size: int
    ranks: list[Facts]
    device: str = ""
    collectives: list[Timing] = field(default_factory=list)
    clocks: list[Clock] = field(default_factory=list)
    storage: Stored | None = None
    apart: str = ""

    @property
    def hosts(self) -> dict[str, list[int]]:
        """The ranks on each host."""
        found: dict[str, list[int]] = {}
        for facts in self.ranks:
            found.setdefault(facts.host, []).append(facts.rank)
        return found


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check.

    Attributes:
        check: Its name, which stays.
        severity: `ok`; `warning`, what may be slow or short; `problem`, what is wrong.
        found: What there is.
        expected: What there should be.
        todo: What to do; nothing where all is well.
    """

    check: str
    severity: Severity
    found: str
    expected: str
    todo: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was seen and found.

    Attributes:
        rank: The rank that has it; only rank 0's is shown.
    """

    seen: Seen
    findings: list[Finding]
    rank: int = 0

    @property
    def exit_code(self) -> int:
        """1 with a problem, else 0."""
        return int(any(finding.severity == "problem" for finding in self.findings))

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        seen = asdict(self.seen)
        return {
            "format": FORMAT,
            "exit_code": self.exit_code,
            "backend": seen.pop("backend"),
            "size": seen.pop("size"),
            "hosts": self.seen.hosts,
            "apart": seen.pop("apart"),
            "findings": [asdict(finding) for finding in self.findings],
            **seen,
        }
