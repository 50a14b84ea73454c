"""The fault table: what happens to checkpoints when writers die and networks, disks and files fail.

`python -m tests.checkpoint.faults` runs all of it (ten to thirty minutes) and prints the table; the
tests run a sample. Everywhere the same must hold: a whole checkpoint no older than the last
committed one is loadable, a torn one never, and `prune` leaves nothing but whole checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import objects
from orchestrator.checkpoint.retention import Last
from orchestrator.retries import Retry
from tests.checkpoint import servers
from tests.checkpoint.proxy import Fault
from tests.checkpoint.targets import LocalTarget, RemoteTarget, Target, expected, files
from tests.checkpoint.victim import PART, Nursery, nursery
from tests.disks import NotHereError, small_disk

PLACES = ("local", "s3", "gcs")
SIZE = 2 * PART + 123456  # three parts of S3's multipart and of GCS's resumable uploads
# A save's requests that change the store are six at least: what begins the large file's upload,
# its parts, (S3) what ends it, the small file, the manifest.
WRITES, MOST = (b"PUT", b"POST"), 6
PATIENT = Retry(budget=60, first=0.1, cap=2)


@dataclass
class Outcome:
    """What a cell of the table came to.

    Attributes:
        runs: How often the fault was brought about.
        seen: How often what happened.
    """

    runs: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.runs} of {self.runs} whole, nothing left after prune"


def check(target: Target, committed: int | None, *, prune: bool = True) -> int | None:
    """Looks at a store as the next run would; returns the step that it goes on from.

    Args:
        target: The store's place.
        committed: The newest step whose `save` returned.
        prune: Whether to prune then, and look for what is left.

    Raises:
        AssertionError: A promise is broken.
    """
    store = target.store(PATIENT)
    with store.newest() as newest:
        step = None if newest is None else newest.checkpoint.step
        assert committed is None or (step is not None and step >= committed), (step, committed)
        if newest is not None:
            size = newest.checkpoint.manifest.files[0].size
            for name, data in expected(newest.checkpoint.step, size).items():
                assert Path(newest.folder, name).read_bytes() == data, (step, name)
    verdicts = store.verify()
    whole = {verdict.step for verdict in verdicts if verdict.problem is None}
    assert max(whole, default=None) == step
    latest = store.latest()
    assert latest is None or step is None or latest.step >= step
    if prune:
        # Nobody harmed the files: where there is a manifest, all is whole.
        problems = {verdict.problem for verdict in verdicts} - {None}
        assert all("there is no manifest" in str(problem) for problem in problems), problems
        store.prune(older_than=-60)
        assert target.leftovers() == []
        assert {v.step for v in store.verify()} == whole
    return step


def kill(target: Target, rng: random.Random, n: int, forks: Nursery) -> Outcome:
    """SIGKILL: half at a point drawn evenly by its name, half at a moment drawn evenly."""
    outcome, status = Outcome(), str(target.spool.parent / "status")
    order: dict[str, Any] = {
        "url": target.url,
        "options": target.options,
        "spool": str(target.spool),
        "status": status,
        "size": SIZE,
    }
    for step in (1, 2, 3):
        assert forks.run({**order, "step": step}) == 0
    dry = json.loads(Path(status + ".points").read_text())
    names: list[str] = dry["points"]
    committed, step = 3, 3
    while outcome.runs < n:
        step += 1
        how: dict[str, Any] = {"delay": rng.uniform(0, dry["seconds"] * 1.05)}
        if step % 2 == 0:
            label = rng.choice(sorted(set(names)))
            how = {"die_at": (label, rng.randrange(names.count(label)))}
        code = forks.run({**order, **how, "step": step})
        assert code in (0, -9), code
        last = json.loads(Path(status).read_bytes() or b'{"phase": "start", "committed": false}')
        outcome.runs += code != 0
        outcome.seen[f"killed in {last['phase']}" if code else "done before the kill"] += 1
        left, uploads = target.leftovers(), len(target.uploads())
        spools = len(os.listdir(target.spool))
        outcome.seen["runs that left something"] += bool(left)
        outcome.seen["multipart uploads left"] += uploads
        outcome.seen["spools left"] += spools
        outcome.seen["files and empty folders left"] += len(left) - uploads - spools
        committed = step if last["committed"] else committed
        committed = check(target, committed) or committed
        # As it was before the first: the next has the oldest to delete.
        target.store(PATIENT).prune([Last(2)])
    return outcome


def network(faults: Callable[[random.Random], Fault]) -> Callable[..., Outcome]:
    """A cell in which a fault between client and server ends by itself, and a save survives."""

    def cell(target: Target, rng: random.Random, n: int, forks: Nursery) -> Outcome:
        if not isinstance(target, RemoteTarget):
            raise NotHereError("no network")
        outcome = Outcome()
        target.store().save(files(1), step=1)
        for step in range(2, n + 2):
            fault = faults(rng)
            target.fault(fault)
            try:
                target.store(PATIENT).save(files(step, SIZE), step=step)
                hits = target.hits
            finally:
                target.fault(Fault())
            outcome.runs += 1
            outcome.seen["runs it came to pass in" if hits else "runs it missed"] += 1
            outcome.seen["times it came to pass"] += hits
            assert check(target, step) == step
        return outcome

    return cell


def harm(change: Callable[[Target, int, random.Random], None]) -> Callable[..., Outcome]:
    """A cell in which the newest checkpoint is harmed: the one before it is loaded."""

    def cell(target: Target, rng: random.Random, n: int, forks: Nursery) -> Outcome:
        outcome, step = Outcome(), 1
        target.store().save(files(step), step=step)
        for _ in range(n):
            before, step = step, step + 1
            target.store().save(files(step), step=step)
            change(target, step, rng)
            found = check(target, before, prune=False)
            assert found == before, (found, before)
            outcome.runs += 1
            # The run goes on from there and comes to the same step again.
            target.store().save(files(step), step=step)
            assert check(target, step) == step
        return outcome

    return cell


def truncate(target: Target, step: int, rng: random.Random) -> None:
    path = target.data_path(step)
    data = target.read(path)
    target.put(path, data[: rng.randrange(len(data))])


def flip(target: Target, step: int, rng: random.Random) -> None:
    path = target.data_path(step, rng.choice(["model.weights.h5", "state.json"]))
    data = bytearray(target.read(path))
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    target.put(path, bytes(data))


def lose_manifest(target: Target, step: int, rng: random.Random) -> None:
    target.remove(f"step-{step:010d}/manifest.json")


def other_manifest(target: Target, step: int, rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = LocalTarget(Path(folder))
        other.store().save(files(step, rng.randrange(1, 5000)), step=step)
        target.put(f"step-{step:010d}/manifest.json", other.read(f"step-{step:010d}/manifest.json"))


def full(target: Target, rng: random.Random, n: int, forks: Nursery) -> Outcome:
    """The disk (elsewhere: the spool's) fills up in a save, then there is room again."""
    outcome = Outcome()
    folder = Path(target.root) if target.kind == "local" else target.spool
    folder.mkdir(exist_ok=True)
    with small_disk(folder, 2**20):
        target.store().save(files(1), step=1)
        for step in range(2, n + 2):
            with pytest.raises(OSError, match="free some of it") as caught:
                target.store().save(files(step, rng.randrange(2**20, 2**22)), step=step)
            assert caught.value.errno == errno.ENOSPC
            assert check(target, step - 1) == step - 1
            target.store().save(files(step), step=step)
            target.store().remove(target.store().list()[0])
            outcome.runs += 1
    return outcome


Cell = Callable[[Target, random.Random, int, Nursery], Outcome]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        cell: Runs it in one place.
        n: How often in the whole table.
        short: How often in the sample.
        is_remote: Whether it needs a network between the writer and the store.
    """

    cell: Cell
    n: int
    short: int
    is_remote: bool = False


def table(*, short: bool) -> dict[str, Row]:
    """All rows; in the sample what the clients wait for is shorter and rarer, too."""
    storm, stall, most = (1.5, 1.0, 1) if short else (20.0, 5.0, 3)

    def cut(rng: random.Random) -> Fault:
        return Fault("cut", after=rng.randrange(2**16, SIZE), times=rng.randrange(1, most + 1))

    def unavailable(rng: random.Random) -> Fault:
        return Fault("unavailable", seconds=storm, method=WRITES, skip=rng.randrange(MOST))

    def stalled(rng: random.Random) -> Fault:
        return Fault("stall", after=rng.randrange(SIZE), seconds=stall, times=1)

    def lost(rng: random.Random) -> Fault:
        times, skip = rng.randrange(1, most + 1), rng.randrange(MOST)
        return Fault("deaf", times=times, method=WRITES, skip=skip)

    return {
        "kill -9": Row(kill, 200, 6),
        "cut mid-upload": Row(network(cut), 20, 1, True),
        f"503 for {storm:g} s": Row(network(unavailable), 6, 1, True),
        f"stall of {stall:g} s": Row(network(stalled), 3, 1, True),
        "answer lost": Row(network(lost), 30, 2, True),
        "disk full": Row(full, 20, 2),
        "file truncated": Row(harm(truncate), 20, 2),
        "one bit flipped": Row(harm(flip), 20, 2),
        "manifest missing": Row(harm(lose_manifest), 20, 2),
        "manifest of another run": Row(harm(other_manifest), 20, 2),
    }


@contextlib.contextmanager
def small_parts() -> Iterator[None]:
    """Multipart uploads of files that are quickly made."""
    before = objects.PART
    objects.PART = PART
    try:
        yield
    finally:
        objects.PART = before


def main(words: list[str] | None = None) -> int:
    """Runs the table, or the part of it that is asked for; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="the sample that the tests run")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--places", nargs="*", default=list(PLACES))
    arguments = parser.parse_args(words)
    failed = 0
    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        forks = stack.enter_context(nursery())
        stack.enter_context(small_parts())
        for place in arguments.places:
            server = None
            if place in servers.KINDS:
                server = stack.enter_context(servers.KINDS[place](top / "servers" / place))
            for name, row in table(short=arguments.short).items():
                if arguments.only in name:
                    folder = top / f"{place}-{name}".replace(" ", "-")
                    folder.mkdir()
                    target = RemoteTarget(place, server, folder) if server else LocalTarget(folder)
                    n = row.short if arguments.short else row.n
                    failed += not _report(name, row, target, n, arguments.seed, forks)
    return 1 if failed else 0


def _report(name: str, row: Row, target: Target, n: int, seed: int, forks: Nursery) -> bool:
    begin = time.monotonic()
    try:
        outcome = row.cell(target, random.Random(f"{seed} {name} {target.kind}"), n, forks)
        text, good = str(outcome), True
        details = [f"    {count:4d} {what}" for what, count in sorted(outcome.seen.items())]
    except NotHereError as error:
        text, good, details = f"- ({error})", True, []
    except Exception as error:  # noqa: BLE001 - one broken cell must not hide the others
        text, good, details = f"BROKEN: {type(error).__name__}: {error}", False, []
    print(f"{name:24} {target.kind:6} {text} ({time.monotonic() - begin:.1f} s)", flush=True)
    print("\n".join(details), end="\n" if details else "", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
