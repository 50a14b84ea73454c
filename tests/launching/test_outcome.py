"""One code for many ranks."""

from __future__ import annotations

import pytest

from orchestrator.launching.outcome import Ended, in_words, verdict


@pytest.mark.parametrize(
    ("ended", "code", "rank"),
    [
        ([(0, 0), (1, 0)], 0, None),
        ([(1, 75), (0, 75)], 75, 1),
        ([(1, 0), (0, 75)], 75, 0),
        ([(1, 75), (0, 137), (2, 1)], 75, 1),
        ([(0, 3), (1, 75)], 3, 0),
        ([(2, 137), (0, 1), (1, 1)], 137, 2),
        ([(0, 1), (1, 137)], 1, 0),
    ],
)
def test_verdict(ended, code, rank):
    outcome = verdict([Ended(rank, code, in_words(code)) for rank, code in ended])
    assert (outcome.code, outcome.rank) == (code, rank)
    assert bool(outcome.reason) == bool(code)


def test_in_words():
    assert in_words(3) == "ended with 3"
    assert in_words(137) == "ended by SIGKILL (137)"
    assert in_words(255) == "ended with 255"
