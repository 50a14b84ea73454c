"""A seeded sample of the fault table, all its rows in all places."""

from __future__ import annotations

import os
import random

import pytest

from tests import disks
from tests.checkpoint import faults, victim
from tests.checkpoint.conftest import make_target


@pytest.fixture(scope="module")
def forks():
    with victim.nursery() as made, faults.small_parts():
        yield made


def cells():
    """Rows and places, but network faults on a local disk, which has none."""
    for row, cell in faults.table(short=True).items():
        for place in faults.PLACES:
            if place != "local" or not cell.is_remote:
                marks = [pytest.mark.servers] if place != "local" else []
                yield pytest.param(row, place, marks=marks)


@pytest.mark.parametrize(("row", "place"), list(cells()))
def test_sample(row, place, forks, tmp_path, started):
    cell = faults.table(short=True)[row]
    target = make_target(place, tmp_path, started)
    seed = os.environ.get("ORCHESTRATOR_FAULT_SEED", "0")
    try:
        outcome = cell.cell(target, random.Random(f"{seed} {row} {place}"), cell.short, forks)
    except disks.NotHereError as reason:
        pytest.skip(str(reason))
    finally:
        target.close()
    assert outcome.runs == cell.short
