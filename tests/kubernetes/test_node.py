"""The nodes of an Indexed Job: they meet, run, are told to end, and end with one code."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time

import pytest
import yaml

from . import pods
from .cases import ROOT

# Leaves its environment, and ends as a word says: with a code, or when it or another is told.
RANK = """\
import json, os, signal, sys, time
folder, how = sys.argv[1:]
me = {k[8:]: v for k, v in os.environ.items() if k.startswith("HOROVOD_")}
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
with open(f"{folder}/rank-{me['RANK']}.part", "w") as file:
    json.dump(me, file)
os.rename(f"{folder}/rank-{me['RANK']}.part", f"{folder}/rank-{me['RANK']}")
if how.isdigit():
    sys.exit(int(how))
while True:
    if told and how != "deaf":
        # As with a flag that travels with the gradients: all ranks hear of it.
        open(f"{folder}/stop", "w").close()
    if how != "deaf" and os.path.exists(f"{folder}/stop"):
        sys.exit(75)
    time.sleep(0.02)
"""

HOROVOD = """\
import sys
import horovod.tensorflow as hvd
import tensorflow as tf
hvd.init()
total = hvd.allreduce(tf.constant([hvd.rank() + 1.0]), op=hvd.Sum)
print("size", hvd.size(), "local", hvd.local_size(), "total", int(total[0]), flush=True)
hvd.shutdown()
"""


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def node(index, port, *command, nodes=2, ranks=1, **options):
    given = {"grace": 10, "linger": 1, "timeout": 20, "interface": "lo", **options}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return pods.running(
        *(sys.executable, pods.SCRIPTS / "node.py", "--nodes", str(nodes), "--ranks", str(ranks)),
        *("--first", "localhost", "--port", str(port), *words, "--", *command),
        JOB_COMPLETION_INDEX=str(index),
    )


def end(process, seconds=pods.DEADLINE):
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def test_ranks_are_numbered_over_all_nodes(tmp_path, port):
    command = pods.python(RANK, tmp_path, "0")
    with (
        node(1, port, *command, ranks=2) as second,
        node(0, port, *command, ranks=2) as first,
    ):
        assert end(first)[0] == 0
        assert end(second)[0] == 0
    found = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(4)]
    names = ("SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "HOSTNAME")
    assert [tuple(one[name] for name in names) for one in found] == [
        ("4", "0", "2", "0", "2", "node-0"),
        ("4", "1", "2", "0", "2", "node-0"),
        ("4", "0", "2", "1", "2", "node-1"),
        ("4", "1", "2", "1", "2", "node-1"),
    ]
    assert {one["GLOO_RENDEZVOUS_PORT"] for one in found} == {str(port)}
    assert {(one["CONTROLLER"], one["GLOO_IFACE"]) for one in found} == {("gloo", "lo")}


@pytest.mark.parametrize("told", [0, 1])
def test_a_preempted_node_ends_all_with_75(tmp_path, port, told):
    command = pods.python(RANK, tmp_path, "wait")
    with node(0, port, *command) as first, node(1, port, *command) as second:
        for rank in range(2):
            pods.wait(first, (tmp_path / f"rank-{rank}").exists, "ranks start")
        (first, second)[told].send_signal(signal.SIGTERM)
        assert end(first)[0] == 75
        assert end(second)[0] == 75


def test_one_failure_is_the_code_of_all(tmp_path, port):
    with (
        node(0, port, *pods.python(RANK, tmp_path, "0")) as first,
        node(1, port, *pods.python(RANK, tmp_path, "3")) as second,
    ):
        assert end(first)[0] == 3
        assert end(second)[0] == 3


def test_a_node_that_comes_again_ends_the_run_and_joins_the_next(tmp_path, port):
    deaf = pods.python(RANK, tmp_path, "deaf")
    good = pods.python(RANK, tmp_path, "0")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(node(0, port, *deaf, grace=1, linger=0.2))
        with node(1, port, *deaf):
            pods.wait(first, (tmp_path / "rank-1").exists, "ranks start")
        # Its pod was lost without a word, and another comes; index 0 still runs its own rank.
        (tmp_path / "rank-1").unlink()
        second = stack.enter_context(node(1, port, *good))
        code, said = end(first)
        assert code == 137, said
        assert "nodes [1] did not say how they ended" in said
        assert second.poll() is None
        assert not (tmp_path / "rank-1").exists()
        first = stack.enter_context(node(0, port, *good))
        assert end(first)[0] == 0
        assert end(second)[0] == 0


def test_a_node_told_while_it_waits_ends_at_once(port):
    with node(1, port, "true") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert end(process)[0] == 143
        assert time.monotonic() - started < 10


def test_those_that_never_come(port):
    with node(0, port, "true", timeout=0.5) as process:
        code, said = end(process)
    assert code == 1
    assert "not all of 2 nodes met in 0.5 s" in said


def test_not_indexed(port):
    with node("", port, "true") as process:
        code, said = end(process)
    assert code == 2
    assert "completionMode Indexed" in said


@pytest.mark.distributed
def test_horovod_meets_there(port):
    command = pods.python(HOROVOD)
    with (
        node(0, port, *command, timeout=60) as first,
        node(1, port, *command, timeout=60) as second,
    ):
        for process in (first, second):
            code, said = end(process, pods.TENSORFLOW)
            assert code == 0, said
            assert "size 2 local 1 total 3" in said


@pytest.mark.distributed
@pytest.mark.slow
def test_a_preempted_node_leaves_a_checkpoint_that_the_next_start_goes_on_from(tmp_path, port):
    tree = yaml.safe_load((ROOT / "launch" / "configs" / "digits.yaml").read_text())
    tree["run"]["dir"] = str(tmp_path / "run")
    tree["checkpoint"] = {"every_epochs": 1000}
    settings = tmp_path / "settings.yaml"

    def nodes(stack, epochs):
        settings.write_text(yaml.safe_dump({**tree, "train": {**tree["train"], "epochs": epochs}}))
        command = [sys.executable, ROOT / "launch" / "train.py", "--config", settings]
        return [
            stack.enter_context(node(index, port, *command, timeout=60, grace=30))
            for index in range(2)
        ]

    tree["callbacks"] = []
    with contextlib.ExitStack() as stack:
        first, second = nodes(stack, 5000)
        history = tmp_path / "run" / "history.csv"

        def trained():
            return history.exists() and history.read_text().count("\n") > 2

        pods.wait(second, trained, "epochs", pods.TENSORFLOW)
        second.send_signal(signal.SIGTERM)
        assert [end(one, pods.TENSORFLOW)[0] for one in (first, second)] == [75, 75]
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 75
    assert "SIGTERM on rank 1" in outcome["reason"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{outcome['step']:010d}").is_dir()
    with contextlib.ExitStack() as stack:
        first, second = nodes(stack, outcome["epoch"] + 2)
        code, said = end(first, pods.TENSORFLOW)
        assert code == 0, said
        assert f"Epoch {outcome['epoch'] + 2}/" in said
        assert "Epoch 1/" not in said
        assert end(second, pods.TENSORFLOW)[0] == 0
