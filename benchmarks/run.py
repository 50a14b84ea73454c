"""`make bench`: what the orchestration costs beside Horovod by hand.

Starts its own ranks, prints tables, and writes all figures as JSON. The machine may be busy:
contestants take turns in one run, and only ratios of neighbours count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
DEADLINE = 240
Row = dict[str, Any]


def launch(ranks: int, script: str, *options: str) -> tuple[list[Row], str]:
    """Runs a script on `ranks` ranks; returns its rows and the command that does it again."""
    python = os.path.relpath(sys.executable, ROOT)
    horovodrun = os.path.relpath(BIN / "horovodrun", ROOT)
    command = [horovodrun, "-np", str(ranks), python, f"benchmarks/{script}", *options]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        process = subprocess.Popen(
            [*command, "--out", str(out)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            output = process.communicate()[0] + f"\nno end within {DEADLINE} seconds"
        if process.returncode or not out.exists():
            sys.exit(f"{output}\nfailed: {' '.join(command)}")
        return json.loads(out.read_text(encoding="utf-8")), " ".join(command)


def shown(values: list[float], digits: int = 2) -> str:
    """`median [first quartile, third quartile]`, or a dash."""
    if not values:
        return "-"
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def table(title: str, command: str, rows: list[Row], columns: dict[str, str]) -> None:
    """Prints rows; `columns` maps a heading to a key of theirs."""
    cells = [list(columns)]
    for row in rows:
        values = (row[key] for key in columns.values())
        cells.append([shown(v) if isinstance(v, list) else str(v) for v in values])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title}\n$ {command}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


STEP_COLUMNS = {
    "contestant": "contestant",
    "turns": "turns",
    "step ms": "step_ms",
    "CPU ms": "cpu_ms",
    "step / loop": "step_to_loop",
    "step / fit by hand": "step_to_fit",
    "CPU / loop": "cpu_to_loop",
    "CPU / fit by hand": "cpu_to_fit",
    "epoch / fit by hand": "epoch_to_fit",
    "epoch end ms": "epoch_end_ms",
}
END_COLUMNS = {
    "metrics": "metrics",
    "way": "way",
    "rounds": "rounds",
    "ms": "ms",
    "communication ms": "communication_ms",
    "rest ms": "rest_ms",
    "to fused": "to_fused",
    "communication to fused": "communication_to_fused",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=20, help="to measure, a step table")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latest.json")
    arguments = parser.parse_args()
    print("median [first quartile, third quartile]; ratios are of neighbours in one run")
    results: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    results |= {"cores": os.cpu_count(), "step": [], "evaluation_end": []}
    for ranks in arguments.ranks:
        for model in ("small", "medium"):
            options = ("--model", model, "--seconds", f"{arguments.seconds:g}")
            rows, command = launch(ranks, "step_time.py", *options)
            table(f"A training step, {model} model, {ranks} ranks", command, rows, STEP_COLUMNS)
            results["step"] += rows
        options = ("--seconds", f"{arguments.seconds / 4:g}")
        rows, command = launch(ranks, "evaluation_end.py", *options)
        table(f"The end of an evaluation, {ranks} ranks", command, rows, END_COLUMNS)
        results["evaluation_end"] += rows
    results["load"] = os.getloadavg()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nAll figures: {arguments.out}")


if __name__ == "__main__":
    main()
