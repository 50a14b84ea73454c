"""The record of a run: one line a decision in `events.jsonl`, and how it ended."""

from __future__ import annotations

import json
import math
import numbers
import threading
import time
from typing import Any

from orchestrator import storage


class Events:
    """Takes every decision of a run; this one keeps none (a script without a run directory)."""

    def emit(self, kind: str, *, epoch: int | None, step: int | None, rank: int, **values: Any):
        """Records one decision.

        Args:
            kind: start, best, checkpoint, plateau, stop, restore or end.
            epoch: Counted from 0; `None` outside epochs.
            step: The optimizer's iterations so far; `None` where there are none.
            rank: The rank that raised it; 0 for what all ranks decide alike.
            values: What the decision was made of; numbers, strings, lists.
        """


class RunDirectory(Events):
    """Files in `run.dir`; made on rank 0 only.

    Args:
        url: The run directory, any fsspec URL. Records of an earlier run in it are replaced.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        storage.remove(storage.join(url, "outcome.json"))
        self._events = storage.Lines(storage.join(url, "events.jsonl"))
        self._lock = threading.Lock()  # checkpoints are committed in a thread of their own

    def emit(self, kind: str, *, epoch: int | None, step: int | None, rank: int, **values: Any):
        """Appends one line to `events.jsonl`; NaN and infinities are written as strings."""
        record = {"time": time.time(), "epoch": epoch, "step": step, "rank": rank, "kind": kind}
        line = json.dumps({**record, **{k: _plain(v) for k, v in values.items()}})
        with self._lock:
            self._events.append(line)

    def outcome(self, exit_code: int, reason: str, epoch: int | None, step: int | None) -> None:
        """Writes `outcome.json`, whole."""
        record = {"exit_code": exit_code, "reason": reason, "epoch": epoch, "step": step}
        storage.write_text(storage.join(self.url, "outcome.json"), json.dumps(record) + "\n")


def _plain(value: Any) -> Any:
    """What JSON has for a value: NumPy's numbers are Python's, NaN and infinities strings."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, int) else int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
