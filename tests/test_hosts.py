"""The hosts that other tests are given: reached by name, cut off, gone with whoever made them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hosts, namespaces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing()),
]


def reaches(net, host):
    words = ["ssh", "-o", "ConnectTimeout=1", host, "hostname"]
    return net.run("one", words).stdout == f"{host}\n"


def test_hosts_reach_each_other_unless_cut_off(tmp_path):
    before = subprocess.run(["ip", "link"], capture_output=True, text=True).stdout
    with hosts.Network(tmp_path / "net", ["one", "two"]) as net:
        firsts = list(net.pids.values())
        assert reaches(net, "two")
        net.cut("two")
        assert not reaches(net, "two")
        assert reaches(net, "one")
        net.restore("two")
        assert reaches(net, "two")
        assert subprocess.run(["ip", "link"], capture_output=True, text=True).stdout == before
    assert list(tmp_path.iterdir()) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in firsts)


MAKER = """\
import pathlib, sys, time
from tests import hosts
with hosts.Network(pathlib.Path(sys.argv[1]), ["one"]) as net:
    print(net._bridge, *net.pids.values(), flush=True)
    time.sleep(600)
"""


def test_they_end_with_whoever_made_them(tmp_path):
    command = [sys.executable, "-c", MAKER, str(tmp_path / "net")]
    maker = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert maker.stdout is not None
    pids = [int(word) for word in maker.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate(timeout=30)

    def gone():
        for pid in pids:
            with contextlib.suppress(OSError):
                # What is dead is not reaped at once by whoever has that to do here.
                if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
                    return False
        return True

    namespaces.wait(gone, "their end")
