"""A report as tables for people, and as JSON for programs."""

from __future__ import annotations

import json
import math
import sys
import time

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.doctor.report import Facts, Finding, Report, Seen
from orchestrator.doctor.wording import count, seconds, size

_STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}
# What a launcher tells each rank of its place; the table of ranks says that.
_PLACE = ("RANK", "SIZE", "HOSTNAME", "RENDEZVOUS_ADDR", "RENDEZVOUS_PORT")


# The launcher kills rank 0 soon after another rank ends, which may not have printed by then.
_HOLD_SECONDS = 2.0


def tell(report: Report, *, as_json: bool) -> None:
    """Prints it on rank 0, to stdout; called by all ranks, does not communicate."""
    if report.rank == 0:
        if as_json:
            # In one piece, its end included, so that no other rank's line comes between.
            sys.stdout.write(f"{one_line(report)}\n")
            sys.stdout.flush()
        else:
            show(report, Console())
    elif report.seen.apart:
        apart = f"rank {report.rank} on {report.seen.ranks[0].host}: {report.seen.apart}"
        print(f"orchestrator doctor: {apart}", file=sys.stderr, flush=True)
        time.sleep(_HOLD_SECONDS)


def one_line(report: Report) -> str:
    """One object on one line: `horovodrun` puts the rank before each line."""
    return json.dumps(report.as_dict(), allow_nan=False)


def show(report: Report, console: Console) -> None:
    """Prints the tables, what to do, and the verdict."""
    seen = report.seen
    console.print(_ranks(seen))
    console.print()
    if variables := _variables(seen.ranks[0]):
        console.print(Text("Environment\n", "bold").append(variables, "default"))
        console.print()
    if seen.collectives:
        console.print(_collectives(seen))
        console.print()
    console.print(_findings(report.findings))
    console.print()
    for finding in report.findings:
        if finding.todo:
            line = Text(finding.check, _STYLE[finding.severity] if finding.severity != "ok" else "")
            console.print(line.append(f": {finding.todo}", "default"), soft_wrap=False)
    console.print(_verdict(report))


def _table(title: str, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.show_edge = False
    for column in columns:
        is_number = column in numbers
        table.add_column(
            column,
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    return table


def _ranks(seen: Seen) -> Table:
    numbers = ("rank", "CPUs", "memory", "/dev/shm", "files")
    table = _table("Ranks", "rank", "host", "device", *numbers[1:], numbers=numbers)
    for facts in seen.ranks:
        files = facts.limits["nofile"][0]
        table.add_row(
            str(facts.rank),
            facts.host,
            _device(facts),
            f"{min(len(facts.cpus), facts.cpu_limit or math.inf):g}",
            size(facts.memory),
            size(facts.shm.free) if facts.shm else "none",
            "unlimited" if files is None else str(files),
        )
    return table


def _device(facts: Facts) -> str:
    if not facts.gpu_names:
        return "CPU"
    return facts.gpu_names[min(facts.local_rank, len(facts.gpu_names) - 1)]


def _variables(facts: Facts) -> str:
    told = facts.environment.items()
    return " ".join(f"{name}={value}" for name, value in told if not name.endswith(_PLACE))


def _collectives(seen: Seen) -> Table:
    numbers = ("size", "median", "bus MB/s")
    title = f"Collectives by {seen.backend}, on the {seen.device[1:4]}"
    table = _table(title, "", *numbers, numbers=numbers)
    for one in seen.collectives:
        rate = f"{one.bus / 1e6:.0f}" if one.bytes >= 2**10 else ""
        table.add_row(one.what, size(one.bytes) if one.bytes else "", seconds(one.seconds), rate)
    return table


def _findings(findings: list[Finding]) -> Table:
    table = _table("Checks", "", "check", "found", "expected")
    table.columns[1].no_wrap = True
    table.columns[0].no_wrap = True
    for one in findings:
        state = Text(one.severity, _STYLE[one.severity])
        table.add_row(state, one.check, Text(one.found), Text(one.expected))
    return table


def _verdict(report: Report) -> Text:
    found = [one.severity for one in report.findings]
    problems, warnings = found.count("problem"), found.count("warning")
    if not problems and not warnings:
        return Text("Nothing is off.", _STYLE["ok"])
    worst = "problem" if problems else "warning"
    return Text(f"{count(problems, 'problem')}, {count(warnings, 'warning')}.", _STYLE[worst])
