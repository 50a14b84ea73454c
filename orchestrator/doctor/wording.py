"""How findings are put into words: who has what, amounts, times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from orchestrator.doctor.report import Facts, Finding, Limit, Severity

_VALUES, _RANKS = 4, 8


def finding(check: str, severity: Severity, found: str, expected: str, todo: str) -> Finding:
    """A finding, with something to do only where something is off."""
    todo = "" if severity == "ok" else todo
    return Finding(check=check, severity=severity, found=found, expected=expected, todo=todo)


def at_least(
    check: str,
    ranks: Sequence[Facts],
    amount: Callable[[Facts], float],
    least: float,
    shown: Callable[[Facts], str],
    expected: str,
    todo: str,
) -> Finding:
    """A warning that names the ranks with less than enough, or the rank that has least."""
    short = [facts for facts in ranks if amount(facts) < least]
    if short:
        return finding(check, "warning", of_each(short, shown), expected, todo)
    return finding(check, "ok", shown(min(ranks, key=amount)), expected, todo)


def of_each(ranks: Iterable[Facts], shown: Callable[[Facts], str]) -> str:
    """Who has what."""
    return by_rank([(facts.rank, shown(facts)) for facts in ranks])


def all_have(ranks: Sequence[Facts], shown: Callable[[Facts], str]) -> str:
    """What all have, or who has what."""
    values = {shown(facts) for facts in ranks}
    return values.pop() if len(values) == 1 else of_each(ranks, shown)


def by_rank(values: Iterable[tuple[int, str]]) -> str:
    """`1024 on rank 1; 4096 on ranks 0, 2`: values in the order of the first rank that has each."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values:
        ranks.setdefault(value, []).append(rank)
    return some([f"{value} on {of_ranks(who)}" for value, who in ranks.items()], _VALUES, "; ")


def of_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 1, 2`."""
    return f"rank{'s' * (len(ranks) > 1)} {some([str(rank) for rank in ranks], _RANKS, ', ')}"


def some(texts: Sequence[str], most: int, between: str) -> str:
    """So many of them, and how many more there are."""
    more = [f"{len(texts) - most} more"] if len(texts) > most else []
    return between.join([*texts[:most], *more])


def count(number: float, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:g} {what}{'s' * (number != 1)}"


def size(number: float) -> str:
    """Bytes in binary units: `64 KiB`, `1.5 GiB`."""
    power = min(4, max(0, int(math.log2(number) // 10))) if number >= 1 else 0
    amount = number / 2 ** (10 * power)
    text = f"{amount:.1f}".removesuffix(".0") if amount < 10 else f"{amount:.0f}"
    return f"{text} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def seconds(number: float) -> str:
    """Seconds in what they are read in: `12 µs`, `0.9 ms`, `1.2 s`."""
    factor, unit = (1e6, "µs") if number < 1e-3 else (1e3, "ms") if number < 1 else (1, "s")
    amount = number * factor
    text = f"{amount:.1f}".removesuffix(".0") if amount < 10 else f"{amount:.0f}"
    return f"{text} {unit}"


def signed(number: float) -> str:
    """Seconds ahead or behind."""
    return f"{'-' if number < 0 else '+'}{seconds(abs(number))}"


def limit(number: Limit) -> str:
    """A limit of the system's."""
    return "unlimited" if number is None else str(number)
