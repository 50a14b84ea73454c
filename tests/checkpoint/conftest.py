"""Stores to test against: a disk, memory, and real servers, which are started once."""

from __future__ import annotations

import contextlib

import fsspec
import pytest

from tests.checkpoint import servers
from tests.checkpoint.targets import LocalTarget, MemoryTarget, RemoteTarget

REMOTE = [pytest.param(kind, marks=pytest.mark.servers) for kind in servers.KINDS]


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """Gives a server by its kind; all are stopped at the end."""

    with contextlib.ExitStack() as stack:
        known = {}

        def start(kind: str) -> servers.Server:
            if kind not in known:
                folder = tmp_path_factory.mktemp("servers") / kind
                known[kind] = stack.enter_context(servers.KINDS[kind](folder))
            return known[kind]

        yield start


def make_target(kind, tmp_path, started):
    if kind == "local":
        return LocalTarget(tmp_path)
    if kind == "memory":
        return MemoryTarget(tmp_path)
    return RemoteTarget(kind, started(kind), tmp_path)


@pytest.fixture(params=["local", "memory", *REMOTE])
def target(request, tmp_path, started):
    """Each kind of store, empty."""
    made = make_target(request.param, tmp_path, started)
    yield made
    made.close()


@pytest.fixture(params=REMOTE)
def remote(request, tmp_path, started):
    """Each kind of store behind a proxy, empty."""
    made = make_target(request.param, tmp_path, started)
    yield made
    made.close()


# Moto, the second S3, is for what stores do; here its client is the same.
@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.servers) for kind in ("s3", "gcs")])
def url(request, tmp_path, started, monkeypatch):
    """A prefix that plain URLs reach, as with credentials and an endpoint in the environment."""
    target = make_target(request.param, tmp_path, started)
    protocol = fsspec.utils.get_protocol(target.url)
    for name in {protocol, {"gs": "gcs", "gcs": "gs"}.get(protocol, protocol)}:
        monkeypatch.setitem(fsspec.config.conf, name, target.options)
    yield target.url
    target.close()
