"""The fault matrix: `python -m tests.distributed.faults` prints the table of docs/reliability.md.

Each fault on rank 0 and on the last, under each launcher, on two and four ranks. Words choose:
`python -m tests.distributed.faults --backends mpi --sizes 2 --ranks last SIGKILL "bit flip"`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.distributed import launcher

TIMEOUT = 6.0
SECONDS = 30.0

# What the output must say, `{rank}` being the rank that went wrong. A killed rank says nothing
# itself: its launcher does, and Horovod's other ranks.
_SILENT = {
    "horovod": r"ended since another rank did: .*ended without a word",
    "mpi": r"BAD TERMINATION|Segmentation fault",
}


def _both(words: str) -> dict[str, str]:
    return dict.fromkeys(_SILENT, words)


EXPLAINED: dict[str, dict[str, str]] = {
    "exception": _both(r"OutOfLuck: rank {rank} is out of luck"),
    "data pipeline": _both(r"OutOfLuck: a record cannot be read"),
    "sys.exit(0)": _both(r"EarlyExitError: sys.exit\(0\) was called in model.fit"),
    "sys.exit(3)": _both(r"EarlyExitError: sys.exit\(3\) was called in model.fit"),
    "os._exit(3)": _SILENT | {"mpi": ""},  # MPICH's mpiexec kills the others without a word
    "SIGKILL": _SILENT,
    "segfault": _both(r"Fatal Python error: Segmentation fault"),
    "SIGSTOP": _both(r"rank {rank}: did not speak: stopped, hung or dead"),
    # Stopped before the start.
    "absent": {
        "horovod": r"before training, waiting in start-up, for all ranks to be there",
        "mpi": r"Timeout \(0:00:20\)!\n(.*\n)*.*backends.py.* in connect",
    },
    "hang": _both(r"rank {rank} \(.*not waiting for other ranks: in its own code"),
    "slow": _both(r"Rank {rank} is slow: its own work takes [\d.]+ times"),
    "NaN": _both(r"NaN or Inf loss encountered at batch \d+ on rank {rank}"),
    "bit flip": _both(r"no longer hold the same state: .*rank\(s\) [\d, ]+ is not"),
    "missing step": _both(r"rank {rank} \(.*waiting in allreduce"),
    "other version": _both(r"keras-orchestrator: .*0\.0\.9 on rank {rank}"),
    "other settings": _both(r"train\.epochs: .*4 on rank {rank}"),
}
# Those of the table; the others are told like one of them.
TABLE = [
    *("exception", "sys.exit(0)", "SIGKILL", "SIGSTOP", "slow", "NaN", "bit flip"),
    *("missing step", "other version", "other settings"),
]
# At a deadline, of which the first `TIMEOUT` seconds are waited.
SLOW = ("SIGSTOP", "hang", "missing step", "absent")
# Told, but trained with to the end.
SURVIVED = ("slow",)


@dataclass(frozen=True)
class Seen:
    """How a job ended after a fault.

    Attributes:
        problem: What was not as it must be; empty if nothing.
        seconds: From the fault to the end of the launcher, or until a survived one is told.
        output: What was printed.
        outcome: outcome.json; empty where there is none.
    """

    problem: str
    seconds: float
    output: str
    outcome: dict


def provoke(backend: str, size: int, fault: str, rank: int, folder: Path) -> Seen:
    """Runs a training in which `rank` goes wrong, and judges its end."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", "tests.distributed.faulty", str(folder), fault, str(rank)]
    env = {"TIMEOUT": str(TIMEOUT)}
    finished = launcher.launch(backend, size, command, folder, deadline=180, env=env)
    end = told(folder / "run" / "events.jsonl") if fault in SURVIVED else time.time()
    at = folder / "fault-at"
    seconds = end - float(at.read_text()) if at.exists() else float("nan")
    path = folder / "run" / "outcome.json"
    outcome = json.loads(path.read_text()) if path.exists() else {}
    wanted = EXPLAINED[fault][backend].replace("{rank}", str(rank))
    tracebacks = len(re.findall(r"^(?:\[\d+\]<stderr>:)?Traceback", finished.output, re.MULTILINE))
    ends = fault not in SURVIVED
    problems = [
        "" if at.exists() else "the fault never came",
        "" if bool(finished.returncode) is ends else f"it ended with {finished.returncode}",
        "" if not finished.left else f"left: {finished.left}",
        "" if seconds < SECONDS + 3 * TIMEOUT * (fault in SLOW) else "too late",
        "" if re.search(wanted, finished.output) else f"nothing like {wanted!r} was printed",
        # One of a rank's, perhaps with what it was raised from, and horovodrun's own.
        "" if tracebacks <= 2 + (backend == "horovod") else f"{tracebacks} tracebacks",
        "" if (outcome.get("exit_code") != 0) is ends else f"outcome.json says {outcome}",
    ]
    return Seen("; ".join(filter(None, problems)), seconds, finished.output, outcome)


def told(events: Path) -> float:
    """When a slow rank was named."""
    lines = events.read_text().splitlines() if events.exists() else []
    times = [event["time"] for event in map(json.loads, lines) if event["kind"] == "slow"]
    return times[0] if times else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(EXPLAINED)}")
    parser.add_argument("--backends", nargs="+", default=["horovod", "mpi"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--ranks", nargs="+", default=["0", "last"])
    parser.add_argument("--folder", type=Path, help="keep what was printed and written there")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    columns = [(b, s, r) for b in asked.backends for s in asked.sizes for r in asked.ranks]
    heads = [f"{b} {s}, rank {r}" for b, s, r in columns]
    print("| fault |", " | ".join(heads), "|")
    print("|---|" + "---|" * len(columns), flush=True)
    problems = []
    for fault in asked.faults or TABLE:
        cells = []
        for backend, size, who in columns:
            rank = size - 1 if who == "last" else int(who)
            name = f"{fault}-{backend}-{size}-{who}".replace(" ", "-")
            seen = provoke(backend, size, fault, rank, folder / name)
            told = "" if "exit_code" in seen.outcome else "*"
            cells.append(f"{seen.seconds:.1f}{told}" if not seen.problem else "**not told**")
            if seen.problem:
                problems.append(f"{name}: {seen.problem}")
                print(problems[-1], file=sys.stderr, flush=True)
        print(f"| {fault} |", " | ".join(cells), "|", flush=True)
    print(f"\nSeconds from the fault to the launcher's end; * no outcome.json. In {folder}.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
