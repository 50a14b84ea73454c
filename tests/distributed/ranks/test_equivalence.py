"""Any number of ranks trains, validates and decides as one process does."""

from __future__ import annotations

import json
import os
from pathlib import Path

from orchestrator.runtime import Runtime
from tests.distributed import equivalence


def test_ranks_equal_the_single_process(runtime, communicator, note):
    reference = json.loads(Path(os.environ["ORCHESTRATOR_TEST_REFERENCE"]).read_text())
    with Runtime(communicator, backend=runtime.backend, seed=7).use() as own:
        ours = equivalence.train(own)
    # To the last bit on all ranks.
    assert all(
        json.loads(other) == ours for other in communicator.allgather_object(json.dumps(ours))
    )
    assert ours["decisions"] == reference["decisions"]
    assert ours["rates"] == reference["rates"]
    for name, difference in equivalence.differences(ours, reference).items():
        note(f"equivalence {name}", difference)
        assert difference <= 1e-5, name
