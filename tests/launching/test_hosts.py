"""Hosts as users write them, and the address they find this machine at."""

from __future__ import annotations

import pytest

from orchestrator.config import SettingError
from orchestrator.launching import hosts
from orchestrator.launching.hosts import Host


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in hosts._SCHEDULERS:
        monkeypatch.delenv(name, raising=False)


def test_parse():
    assert hosts.parse("node-1.example:4, 10.0.0.2:1") == [
        Host("node-1.example", 4),
        Host("10.0.0.2", 1),
    ]


@pytest.mark.parametrize("text", ["node1", "node1:", "node1:0", "node1:x", "a:1,", "-x:1 y", ""])
def test_parse_says_what_is_wrong(text):
    with pytest.raises(SettingError, match=r"write node1:4,node2:4"):
        hosts.parse(text)


def test_read(tmp_path):
    """As Horovod and Open MPI, and as MPICH write them."""
    file = tmp_path / "hostfile"
    file.write_text(
        "# ours\nnode1 slots=4\n\nnode2:2  # small\nnode3\nnode4 slots = 8 max_slots=8\n"
    )
    assert [str(host) for host in hosts.read(str(file))] == [
        "node1:4",
        "node2:2",
        "node3:1",
        "node4:8",
    ]


def test_read_says_what_is_wrong(tmp_path):
    file = tmp_path / "hostfile"
    with pytest.raises(SettingError, match="cannot be read"):
        hosts.read(str(file))
    file.write_text("# nothing\n")
    with pytest.raises(SettingError, match="names no host"):
        hosts.read(str(file))
    file.write_text("node1 slots=many\n")
    with pytest.raises(SettingError, match="'node1:many'"):
        hosts.read(str(file))


def test_addresses(monkeypatch):
    monkeypatch.setattr(hosts, "_is_here", lambda name: name == "here")
    monkeypatch.setattr(
        hosts, "_address_towards", lambda name: {"away": "10.0.0.1", "far": "10.0.1.1"}.get(name)
    )
    assert hosts.addresses([]) == ["127.0.0.1"]
    assert hosts.addresses([Host("here", 2)]) == ["127.0.0.1"]
    assert hosts.addresses([Host("here", 2), Host("away", 2)]) == ["10.0.0.1"]
    assert hosts.addresses([Host("away", 2), Host("far", 2), Host("?", 1)]) == [
        "10.0.0.1",
        "10.0.1.1",
    ]


def test_addresses_where_a_scheduler_names_the_hosts(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    routes = {hosts._ANYWHERE: "10.0.0.1"}
    monkeypatch.setattr(hosts, "_address_towards", routes.get)
    assert hosts.addresses([]) == ["10.0.0.1"]
    routes.clear()
    assert hosts.addresses([]) == ["127.0.0.1"]  # no network: nobody else can be meant


def test_this_machine_is_here():
    assert hosts._is_here("localhost")
    assert hosts._is_here("127.0.0.1")
    assert not hosts._is_here("203.0.113.7")
    assert not hosts._is_here("node.invalid")
