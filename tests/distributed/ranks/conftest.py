"""What the tests that run on every rank at once are given."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest

from tests.distributed import rank_plugin


@pytest.fixture
def communicator():
    return rank_plugin.runtime.communicator


@pytest.fixture
def runtime():
    """The one `init` of this process; names and seeds begin anew in each test."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(7)
    return rank_plugin.runtime


@pytest.fixture
def note():
    """`note(name, value)`: a figure for the outer test's report; the worst of all ranks counts."""

    def write(name: str, value: float) -> None:
        rank_plugin.figures[name] = max(float(value), rank_plugin.figures.get(name, 0.0))

    return write


@pytest.fixture
def shared_path(request, communicator) -> Path:
    """An empty folder, the same on every rank."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    path = rank_plugin.FOLDER / "shared" / name
    if communicator.rank == 0:
        path.mkdir(parents=True)
    communicator.barrier()
    return path
