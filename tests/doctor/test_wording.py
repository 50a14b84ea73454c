"""Amounts and times as people read them."""

from __future__ import annotations

import pytest

from orchestrator.doctor import wording


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (4, "4 B"),
        (65536, "64 KiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**60, "1048576 TiB"),
        (16 * 2**20, "16 MiB"),
    ],
)
def test_size(number, text):
    assert wording.size(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(12e-6, "12 µs"), (0.0009, "900 µs"), (0.0014, "1.4 ms"), (0.5, "500 ms"), (61.2, "61 s")],
)
def test_seconds(number, text):
    assert wording.seconds(number) == text


def test_signed():
    assert [wording.signed(n) for n in (-2, 0.0, 3e-5)] == ["-2 s", "+0 µs", "+30 µs"]


def test_by_rank():
    assert wording.by_rank([(0, "b"), (1, "a"), (2, "b")]) == "b on ranks 0, 2; a on rank 1"
    assert wording.by_rank([]) == ""
