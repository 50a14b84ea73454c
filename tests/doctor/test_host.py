"""What a process may use of its host."""

from __future__ import annotations

import os
import resource

import pytest

from orchestrator import SettingError
from orchestrator.doctor import host


def write(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_limits():
    found = host.limits()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert found["nofile"] == (soft, None if hard == resource.RLIM_INFINITY else hard)
    assert set(found) == {"nofile", "memlock", "nproc", "stack", "core"}


def test_environment():
    given = {
        "NCCL_DEBUG": "INFO",
        "HOROVOD_SECRET_KEY": "x",
        "HOME": "/root",
        "OMP_NUM_THREADS": "1",
        "TF_CLI_CONFIG_FILE": "x",
    }
    assert host.environment(given) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}


def test_space(tmp_path):
    found = host.space(str(tmp_path / "not" / "yet"))
    assert found.path == str(tmp_path / "not" / "yet")
    assert found.writable
    assert found.total == os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    assert 0 < found.free <= found.total
    assert not (tmp_path / "not").exists()


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingError, match="file is a file, not a folder"):
        host.space(str(tmp_path / "file" / "run"))
    with pytest.raises(SettingError, match="not a local folder: give one, and the URL as --stor"):
        host.space("s3://bucket/run")


def test_no_limits(tmp_path):
    write(tmp_path / "proc" / "self" / "cgroup", "0::/\n")
    write(tmp_path / "proc" / "meminfo", "MemTotal:  2048 kB\nMemFree: 1 kB\n")
    write(tmp_path / "cg" / "cpu.max", "max 100000\n")
    write(tmp_path / "cg" / "memory.max", "max\n")
    assert host.cpu_limit(tmp_path / "proc", tmp_path / "cg") is None
    assert host.memory(tmp_path / "proc", tmp_path / "cg") == 2 * 2**20


def test_cgroup_2(tmp_path):
    write(tmp_path / "proc" / "self" / "cgroup", "0::/pod/container\n")
    write(tmp_path / "proc" / "meminfo", "MemTotal: 8192 kB\n")
    write(tmp_path / "cg" / "pod" / "cpu.max", "150000 100000\n")
    write(tmp_path / "cg" / "pod" / "container" / "cpu.max", "max 100000\n")
    write(tmp_path / "cg" / "pod" / "container" / "memory.max", "1048576\n")
    assert host.cpu_limit(tmp_path / "proc", tmp_path / "cg") == 1.5
    assert host.memory(tmp_path / "proc", tmp_path / "cg") == 2**20


def test_cgroup_1_seen_from_inside_a_container(tmp_path):
    text = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"
    write(tmp_path / "proc" / "self" / "cgroup", text)
    write(tmp_path / "proc" / "meminfo", "MemTotal: 8192 kB\n")
    write(tmp_path / "cg" / "cpu" / "cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "cg" / "cpu" / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cg" / "memory" / "memory.limit_in_bytes", "2097152\n")
    assert host.cpu_limit(tmp_path / "proc", tmp_path / "cg") == 0.5
    assert host.memory(tmp_path / "proc", tmp_path / "cg") == 2 * 2**20
    write(tmp_path / "cg" / "cpu" / "cpu.cfs_quota_us", "-1\n")
    assert host.cpu_limit(tmp_path / "proc", tmp_path / "cg") is None


def test_this_host():
    assert host.cpus() == sorted(os.sched_getaffinity(0))
    assert host.memory() > 2**28
