"""A training step of `fit` on our runtime against Horovod by hand; started by horovodrun."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
from contestants import digits, fit_by_hand, loop_by_hand, our_fit
from turns import Turns, publish, quartiles, slowest

import orchestrator

# Steps an epoch, and steps a turn.
STEPS = {"small": (50, 5), "medium": (20, 2)}


def measure(kind: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each contestant; called by all ranks."""
    runtime = orchestrator.init("horovod", seed=7)
    epoch, turn = STEPS[kind]
    data, part = digits(epoch, runtime.rank, runtime.size)
    turns = Turns(steps=turn, seconds=seconds)
    ends: list[float] = []

    def step(name: str) -> functools.partial[bool]:
        return functools.partial(turns.step, name)

    times = turns.run(
        {
            "loop by hand": loop_by_hand(kind, part, step("loop by hand")),
            "the same again": loop_by_hand(kind, part, step("the same again")),
            "fit by hand": fit_by_hand(kind, part, step("fit by hand")),
            "our fit": our_fit(kind, runtime, data, step("our fit"), ends),
        }
    )
    end_ms = slowest(ends[1:-1]) * 1e3
    loop, fit = times["loop by hand"], times["fit by hand"]
    return [
        {
            "model": kind,
            "ranks": runtime.size,
            "contestant": name,
            "turns": len(own),
            "step_ms": quartiles(own[:, 0] / turn * 1e3),
            "cpu_ms": quartiles(own[:, 1] / turn * 1e3),
            "step_to_loop": quartiles(own[:, 0] / loop[:, 0]),
            "step_to_fit": quartiles(own[:, 0] / fit[:, 0]),
            "cpu_to_loop": quartiles(own[:, 1] / loop[:, 1]),
            "cpu_to_fit": quartiles(own[:, 1] / fit[:, 1]),
            "epoch_to_loop": quartiles(_epochs(own, epoch // turn) / _epochs(loop, epoch // turn)),
            "epoch_to_fit": quartiles(_epochs(own, epoch // turn) / _epochs(fit, epoch // turn)),
            "epoch_end_ms": quartiles(end_ms) if name == "our fit" else [],
        }
        for name, own in times.items()
    ]


def _epochs(times: np.ndarray, turns: int) -> np.ndarray:
    """Seconds of as many turns as make an epoch, one epoch's end included."""
    return times[: len(times) // turns * turns, 0].reshape(-1, turns).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=STEPS, default="small")
    parser.add_argument("--seconds", type=float, default=40, help="how long to measure")
    parser.add_argument("--out", type=Path, help="write JSON there, not to the terminal")
    arguments = parser.parse_args()
    publish(measure(arguments.model, arguments.seconds), arguments.out)


if __name__ == "__main__":
    main()
