"""What is saved when and what is kept: tables."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

from orchestrator.checkpoint.retention import (
    Best,
    Entry,
    EveryEpochs,
    EveryMinutes,
    EverySteps,
    Last,
    Moment,
    Multiples,
    kept,
)


def entries(**losses: float) -> list[Entry]:
    return [Entry(int(step[1:]), {"loss": value}) for step, value in losses.items()]


@pytest.mark.parametrize(
    ("policy", "last", "now", "due"),
    [
        (EveryEpochs(), (0, 0, 0), (0, 50, 9e9), False),
        (EveryEpochs(), (0, 0, 0), (1, 100, 1), True),
        (EveryEpochs(), (1, 100, 0), (1, 150, 1), False),
        (EveryEpochs(3), (0, 0, 0), (2, 200, 1), False),
        (EveryEpochs(3), (0, 0, 0), (3, 300, 1), True),
        (EveryEpochs(3), (3, 300, 0), (5, 500, 1), False),
        (EveryEpochs(3), (4, 400, 0), (6, 600, 1), True),  # on the grid, whenever it was saved
        (EverySteps(100), (0, 0, 0), (0, 99, 1), False),
        (EverySteps(100), (0, 0, 0), (0, 100, 1), True),
        (EverySteps(100), (0, 100, 0), (0, 100, 1), False),
        (EverySteps(100), (0, 96, 0), (0, 112, 1), True),  # jumps of 16 miss the 100 itself
        (EverySteps(100), (0, 112, 0), (0, 192, 1), False),
        (EveryMinutes(10), (0, 0, 0), (0, 5, 599), False),
        (EveryMinutes(10), (0, 0, 0), (0, 5, 600), True),
        (EveryMinutes(10), (0, 5, 0), (0, 5, 900), False),
        (EveryMinutes(0.5), (0, 5, 100), (0, 6, 130), True),
    ],
)
def test_due(policy, last, now, due):
    assert policy.due(Moment(*last), Moment(*now)) is due


def test_a_run_of_steps_saves_as_often_as_asked():
    policy, last, saved = EverySteps(100), Moment(0, 0, 0.0), []
    for step in range(0, 1001, 7):
        now = Moment(0, step, 0.0)
        if policy.due(last, now):
            saved.append(step)
            last = now
    assert saved == [105, 203, 301, 406, 504, 602, 700, 805, 903]


LOSSES = entries(s1=0.9, s2=0.3, s3=0.5, s4=0.3, s5=math.nan, s6=0.7)


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (Last(), {6}),
        (Last(2), {5, 6}),
        (Last(99), {1, 2, 3, 4, 5, 6}),
        (Best("loss"), {2}),
        (Best("loss", "max"), {1}),
        (Best("loss", n=2), {2, 4}),
        (Best("loss", n=3), {2, 3, 4}),
        (Best("loss", n=99), {1, 2, 3, 4, 6}),
        (Best("accuracy", "max"), set()),
        (Multiples(3), {3, 6}),
        (Multiples(100), set()),
    ],
)
def test_keep(policy, steps):
    assert policy.keep(LOSSES) == steps
    assert policy.keep([]) == set()


@pytest.mark.parametrize(
    ("policies", "steps"),
    [
        ([], {1, 2, 3, 4, 5, 6}),
        ([Last(2)], {5, 6}),
        ([Best("loss")], {2, 6}),  # the newest, too
        ([Multiples(100)], {6}),
        ([Best("loss"), Last(2), Multiples(3)], {2, 3, 5, 6}),
    ],
)
def test_kept(policies, steps):
    assert kept(policies, LOSSES[::-1]) == steps
    assert kept(policies, []) == set()


def test_infinities_are_ordered():
    assert Best("loss", n=2).keep(entries(s1=math.inf, s2=1.0, s3=-math.inf)) == {2, 3}


@pytest.mark.parametrize("kind", [EveryEpochs, EverySteps, EveryMinutes, Last, Multiples])
@pytest.mark.parametrize("n", [0, -1, math.nan])
def test_n_is_positive(kind, n):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(n="):
        kind(n)


def test_a_wrong_mode():
    with pytest.raises(ValueError, match="'min' or 'max'"):
        Best("loss", cast(Any, "less"))
