"""The record of a run: one line a decision in `events.jsonl`, and how it ended."""

from __future__ import annotations

import json
import math
import numbers
import threading
import time
from typing import Any

from orchestrator import storage

# Of a process, not of the training it continues: kept whatever the training goes back to.
OF_A_PROCESS = ("start", "resume", "preempt", "fault", "slow", "times")


class Events:
    """Takes every decision of a run; this one keeps none (a script without a run directory).

    Attributes:
        decisions: Decisions taken so far, those of the runs that this one continues included.
    """

    decisions = 0

    def emit(self, kind: str, *, epoch: int | None, step: int | None, rank: int, **values: Any):
        """Records one decision.

        Args:
            kind: start, best, checkpoint, plateau, stop, restore, resume, preempt, nan, fault,
                slow, times or end.
            epoch: Counted from 0; `None` outside epochs.
            step: The optimizer's iterations so far; `None` where there are none.
            rank: The rank that raised it; 0 for what all ranks decide alike.
            values: What the decision was made of; numbers, strings, lists.
        """

    def rewind(self, decisions: int, step: int) -> None:
        """Goes back to where a checkpoint was made: what came later will come once more.

        Args:
            decisions: As many are kept.
            step: Later state checkpoints are forgotten.
        """
        self.decisions = decisions


class RunDirectory(Events):
    """Files in `run.dir`; made on rank 0 only.

    Args:
        url: The run directory, any fsspec URL.
        keep: Whether to go on behind the records of an earlier run in it.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, url: str, *, keep: bool = False) -> None:
        self.url = url
        storage.remove(storage.join(url, "outcome.json"))
        self._events = storage.Lines(storage.join(url, "events.jsonl"), keep=keep)
        self._lock = threading.Lock()  # checkpoints are committed in a thread of their own

    def emit(self, kind: str, *, epoch: int | None, step: int | None, rank: int, **values: Any):
        """Appends one line to `events.jsonl`; NaN and infinities are written as strings."""
        record = {"time": time.time(), "epoch": epoch, "step": step, "rank": rank, "kind": kind}
        record |= {key: _plain(value) for key, value in values.items()}
        with self._lock:
            self._events.append(json.dumps(record))
            self.decisions += _is_decision(record)

    def rewind(self, decisions: int, step: int) -> None:
        """Rewrites `events.jsonl` without what came later."""
        with self._lock:
            kept, seen = [], 0
            for line in self._events.read().splitlines():
                record = _record(line)
                seen += _is_decision(record)
                if _is_decision(record):
                    keep = seen <= decisions
                else:
                    of_state = record.get("kind") == "checkpoint" and record["step"] > step
                    keep = bool(record) and not of_state
                kept += [line] if keep else []
            self._events.replace(kept)
            self.decisions = decisions

    def outcome(self, exit_code: int, reason: str, epoch: int | None, step: int | None) -> None:
        """Writes `outcome.json`, whole."""
        write_outcome(self.url, exit_code, reason, epoch, step)


def write_outcome(
    url: str, exit_code: int, reason: str, epoch: int | None = None, step: int | None = None
) -> None:
    """Writes a run directory's `outcome.json`, whole."""
    record = {"exit_code": exit_code, "reason": reason, "epoch": epoch, "step": step}
    storage.write_text(storage.join(url, "outcome.json"), json.dumps(record) + "\n")


def _record(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # cut off where a writer died
        return {}


def _is_decision(record: dict[str, Any]) -> bool:
    """Whether the training makes it again when it is continued from before it."""
    of_state = record.get("kind") == "checkpoint" and "state" in record
    return bool(record) and record["kind"] not in OF_A_PROCESS and not of_state


def _plain(value: Any) -> Any:
    """What JSON has for a value: NumPy's numbers are Python's, NaN and infinities strings."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, int) else int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
