"""The GPU wheel compiles and loads on a machine with nvcc and no GPU.

The tool itself loads what it has built, checks `hvd.nccl_built()` and makes an allreduce on the
CPU, and only then puts the wheel into its cache; so a wheel that it prints has passed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "build_horovod"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(NVCC is None, reason="the GPU build needs NVIDIA's compiler, nvcc")
def test_the_gpu_wheel_builds_loads_and_links_nccl():
    built = subprocess.run(
        [sys.executable, str(TOOL), "--gpu"], capture_output=True, text=True, timeout=1400
    )
    assert built.returncode == 0, built.stderr
    wheel = Path(built.stdout.splitlines()[-1])
    assert ".gpu" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [n for n in archive.namelist() if "tensorflow/mpi_lib" in n and ".so" in n]
        assert b"libnccl.so.2" in archive.read(library)


@pytest.mark.slow
def test_a_cached_cpu_wheel_is_printed_at_once():
    command = [sys.executable, str(TOOL)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert again.stdout == built.stdout
    assert Path(again.stdout.splitlines()[-1]).is_file()
