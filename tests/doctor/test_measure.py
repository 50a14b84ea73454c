"""Collectives timed and clocks compared, on ranks that are threads."""

from __future__ import annotations

import pytest

from orchestrator.doctor import measure
from tests.distributed import threads

ROUNDS = [(10.0, 10.1), (20.0, 20.03), (30.0, 30.02)]


def test_an_offset():
    # 2 s ahead; of the second round it is known to 15 ms, of the third to 10 ms
    theirs = [(12.0, 12.1), (22.005, 22.03), (32.0, 32.02)]
    found = measure.offset(1, ROUNDS, theirs)
    least, most = max(1.9, 1.975, 1.98), min(2.1, 2.03, 2.02)
    assert found.rank == 1
    assert found.offset == pytest.approx((least + most) / 2)
    assert found.uncertainty == pytest.approx((most - least) / 2)
    assert abs(found.offset - 2.0) <= found.uncertainty


@pytest.mark.parametrize("ahead", [0.0, -3600.0, 0.25])
def test_the_truth_is_within_the_bounds(ahead):
    # in each round the rank enters at another time, and leaves at another
    late = [(0.01, 0.005), (0.0, 0.004), (0.015, 0.0)]
    theirs = [
        (entered + a + ahead, left - b + ahead)
        for (entered, left), (a, b) in zip(ROUNDS, late, strict=True)
    ]
    found = measure.offset(3, ROUNDS, theirs)
    assert abs(found.offset - ahead) <= found.uncertainty + 1e-9
    assert found.uncertainty <= 0.02


def test_rank_0_is_the_measure():
    found = measure.offset(0, ROUNDS, ROUNDS)
    assert (found.offset, found.uncertainty) == (0.0, 0.0)


def test_collectives(monkeypatch):
    monkeypatch.setattr(measure, "SIZES", {4: 3, 4096: 2})
    ranks = threads.run(2, lambda communicator: measure.collectives(communicator, "/CPU:0"))
    assert ranks[0] == ranks[1], "all ranks have the same"
    told = [(t.what, t.bytes, t.repeats, t.wrong) for t in ranks[0]]
    assert told == [
        ("barrier", 0, 3, []),
        ("allreduce", 4, 3, []),
        ("allreduce", 4096, 2, []),
        ("broadcast", 4096, 2, []),
    ]
    assert all(0 < t.seconds < 10 for t in ranks[0])
    large, broadcast = ranks[0][2:]
    assert large.bus == pytest.approx(4096 / large.seconds), "2 (n - 1) / n is 1 with two"
    assert broadcast.bus == pytest.approx(4096 / broadcast.seconds)


def test_the_bus_carries_more_with_more_ranks(monkeypatch):
    monkeypatch.setattr(measure, "SIZES", {4: 1})
    (one, *_) = [
        t
        for t in threads.run(4, lambda c: measure.collectives(c, "/CPU:0"))[0]
        if t.what == "allreduce"
    ]
    assert one.bus == pytest.approx(4 * 1.5 / one.seconds)


def test_a_wrong_sum_is_named(monkeypatch):
    monkeypatch.setattr(measure, "SIZES", {4: 1})

    def rank(communicator):
        if communicator.rank == 1:
            right = communicator.sum_gradients
            communicator.sum_gradients = lambda buckets, name: [[right(buckets, name)[0][0] + 1]]
        return measure.collectives(communicator, "/CPU:0")

    for found in threads.run(3, rank):
        assert [t.wrong for t in found if t.what == "allreduce"] == [[1]]


def test_clocks():
    (one, two) = threads.run(2, measure.clocks)
    assert one == two
    assert [clock.rank for clock in one] == [0, 1]
    # one clock, and threads that may wait for their turn
    assert abs(one[1].offset) <= one[1].uncertainty
    assert one[1].uncertainty < 1
