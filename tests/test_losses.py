"""The reported loss of batches, from what all ranks kept of them."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.losses import mean_of


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[6.0, 3.0, 4.0]], 2.0),
        ([[6.0, 3.0, 4.0], [5.0, 1.0, 2.0]], 3.0),  # 2 for four samples, 5 for two
        ([[6.0, 3.0, 4.0], [0.0, 0.0, 4.0]], 1.0),  # a batch that is masked whole counts, as 0
        ([[0.0, 0.0, 0.0]], 0.0),  # no sample at all
    ],
)
def test_batches_count_by_samples(rows, expected):
    assert mean_of(np.array(rows)) == pytest.approx(expected)
