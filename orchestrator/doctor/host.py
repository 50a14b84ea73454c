"""What this process may use of its host: CPUs, memory, disks, limits. Reads files, no more."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.config import SettingError
from orchestrator.doctor.report import Limit, Space

LIMITS = {
    "nofile": resource.RLIMIT_NOFILE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "nproc": resource.RLIMIT_NPROC,
    "stack": resource.RLIMIT_STACK,
    "core": resource.RLIMIT_CORE,
}
_PREFIXES = (
    *("HOROVOD_", "NCCL_", "UCX_", "FI_", "MPICH_", "MPIR_CVAR_", "OMPI_MCA_"),
    *("TF_NUM_", "TF_ENABLE_", "TF_XLA_", "TF_GPU_", "TF_FORCE_"),
)
_NAMES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "KERAS_BACKEND", "XLA_FLAGS")
_SECRET = ("SECRET", "TOKEN", "PASSWORD", "CREDENTIAL")
_CGROUP = Path("/sys/fs/cgroup")


def limits() -> dict[str, tuple[Limit, Limit]]:
    """The soft and hard limit of each kind; `None` for unlimited."""
    found: dict[str, tuple[Limit, Limit]] = {}
    for name, kind in LIMITS.items():
        soft, hard = (None if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(kind))
        found[name] = (soft, hard)
    return found


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how ranks talk or which devices they use, sorted."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if (name.startswith(_PREFIXES) or name in _NAMES)
        and not any(word in name for word in _SECRET)
    }


def space(folder: str) -> Space:
    """The filesystem of a folder; of the nearest one above where it does not exist yet.

    Raises:
        SettingError: It is a URL, or a file.
    """
    if "://" in folder:
        raise SettingError(
            f"--dir {folder} is not a local folder: give one, and the URL as --storage."
        )
    path = Path(folder).expanduser().absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    if not there.is_dir():
        raise SettingError(f"--dir {folder} is not allowed: {there} is a file, not a folder.")
    usage = shutil.disk_usage(there)
    writable = os.access(there, os.W_OK | os.X_OK)
    return Space(path=str(path), total=usage.total, free=usage.free, writable=writable)


def shared_memory() -> Space | None:
    """`/dev/shm`, if there is one."""
    return space("/dev/shm") if os.path.isdir("/dev/shm") else None


def cpus() -> list[int]:
    """The numbers of the CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def cpu_limit(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> float | None:
    """How many CPUs this process's cgroup, or one above it, gets at once; `None` for no limit."""
    found = []
    for folder in _cgroups(proc, cgroup, "cpu"):
        words = _text(folder / "cpu.max").split()
        words = words or [_text(folder / f"cpu.cfs_{n}_us").strip() for n in ("quota", "period")]
        if all(word.isdigit() for word in words):  # else "max", or -1
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def memory(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> int:
    """Bytes of the host, or of this process's cgroup or one above it where that is less."""
    lines = _text(proc / "meminfo").splitlines()
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:")]
    for folder in _cgroups(proc, cgroup, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            word = _text(folder / name).strip()
            found += [int(word)] if word.isdigit() else []
    return min(found, default=0)


def infiniband() -> list[str]:
    """The devices of RDMA networks, by name."""
    folder = Path("/sys/class/infiniband")
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []


def _cgroups(proc: Path, root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup and those above it, in version 2 and 1, as far as they can be seen."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        # In a container its own path may not be there, and its root is where the limit stands.
        leaf = top / path.lstrip("/")
        yield from (one for one in (leaf, *leaf.parents) if one.is_relative_to(top))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
