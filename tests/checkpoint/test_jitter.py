"""How often a server fails does not show in what training draws."""

from __future__ import annotations

import random

import pytest

from orchestrator.checkpoint.store import CheckpointStore
from tests.checkpoint.proxy import Fault
from tests.checkpoint.targets import QUICK, files

pytestmark = pytest.mark.servers


def test_waits_are_drawn_apart(remote):
    store = CheckpointStore(remote.url, retry=QUICK, spool=str(remote.spool), **remote.options)
    store.save(files(1, 3000), step=1)
    before = random.getstate()
    remote.fault(Fault("unavailable", times=2))
    made = store.save(files(2, 3000), step=2)
    assert remote.hits == 2
    assert store.latest() == made
    assert random.getstate() == before
