"""`orchestrator doctor` without a launcher, as from a shell."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import keras
import tensorflow as tf

from tests.distributed import launcher


def run(*words: str):
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", "doctor", *words]
    env = launcher.environment(COLUMNS="100")
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=env
    )


def test_one_process(tmp_path):
    result = run("--json", "--storage", str(tmp_path / "new"), "--dir", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["backend"], found["size"]) == ("single", 1)
    assert found["hosts"] == {socket.gethostname(): [0]}
    assert (found["collectives"], found["clocks"]) == ([], [])
    (rank,) = found["ranks"]
    assert (rank["rank"], rank["local_rank"], rank["local_size"]) == (0, 0, 1)
    assert rank["versions"]["TensorFlow"] == tf.__version__
    assert rank["versions"]["Keras"] == keras.__version__
    assert rank["horovod"]["built_for"] == tf.__version__
    assert rank["horovod"]["parts"]["gloo"] is True
    assert rank["horovod"]["error"] == ""
    assert rank["mpi"]["parts"]["library"].startswith("MPICH ")
    assert rank["cpus"] == sorted(os.sched_getaffinity(0))
    assert rank["disks"][0]["path"] == str(tmp_path / "run")
    assert rank["environment"]["CUDA_VISIBLE_DEVICES"] == "-1"
    assert list(found["storage"]["seconds"]) == ["write", "read", "list", "delete"]
    checks = {finding["check"]: finding for finding in found["findings"]}
    assert checks["storage"]["severity"] == "ok"
    assert "horovodrun -np 2 orchestrator doctor" in checks["launch"]["todo"]
    assert os.listdir(tmp_path) == []


def test_a_table_and_storage_that_fails():
    result = run("--storage", "nonesuch://bucket/run")
    assert result.returncode == 1, result.stderr
    assert "storage: No run can write to nonesuch://bucket/run" in result.stdout
    assert "1 problem, " in result.stdout.splitlines()[-1]


def test_bad_words():
    result = run("--backend", "nccl")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--backend nccl is unknown. Allowed: auto, horovod, mpi" in result.stderr
    result = run("--dir", "s3://bucket/run")
    assert result.returncode == 2
    assert "not a local folder" in result.stderr
