"""A rank that waits too long for the others says so, asks who can still speak, and ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from typing import Any

from orchestrator.faults import Faults
from orchestrator.waits import Wait, Waits

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
# How often a rank that has not moved looks for what others wrote, by where that is.
_LOCAL_SECONDS, _REMOTE_SECONDS = 1.0, 15.0
# A process that was stopped for so long counts anew: it was not the others that it waited for.
_FROZEN_SECONDS = 5.0
_QUIET_SECONDS = 5.0
# Whatever hangs while a rank says its last, such as storage.
_LAST_SECONDS = 60.0


class Deadline:
    """Watches one rank's `waits` from a daemon thread, once a second; does not communicate.

    Past the limit of a wait this rank writes what it waits for and its Python stacks to
    `faults.url`. Every other rank that still runs finds that there and does the same. The first
    then says which ranks wait where and which did not speak, and all end with 70.

    Args:
        waits: The record.
        name: What this rank is called before `faults` is known.

    Attributes:
        faults: Where to write, once all ranks are there.
    """

    def __init__(self, waits: Waits, name: str) -> None:
        self.waits = waits
        self.faults: Faults | None = None
        self._name = name
        self._stop = threading.Event()
        self._tick = min(1.0, max(waits.timeout / 4, 0.01))
        self._looking: threading.Thread | None = None
        self._others_noted = False
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends watching."""
        self._stop.set()

    def _watch(self) -> None:
        clock = self.waits.clock
        before = looked = clock()
        thawed = float("-inf")
        while not self._stop.wait(self._tick):
            now = clock()
            if now - before > self._tick + _FROZEN_SECONDS:
                thawed = now
            before = now
            wait = self.waits.current
            if wait is not None and now - max(wait.since, thawed) > wait.limit:
                self._speak(wait)
            if self._others_noted:
                self._speak(wait)
            quiet = now - self.waits.moved
            if quiet > min(_QUIET_SECONDS, self.waits.timeout / 2) and self.faults is not None:
                every = _LOCAL_SECONDS if self.faults.is_local else _REMOTE_SECONDS
                if now - looked >= every:
                    looked = now
                    self._look()

    def _look(self) -> None:
        """In a thread of its own: storage may take its time, and this rank's limit may pass."""
        if self._looking is None or not self._looking.is_alive():
            self._looking = threading.Thread(target=self._find, name="deadline-look", daemon=True)
            self._looking.start()

    def _find(self) -> None:
        if self.faults is not None and self.faults.others_noted():
            self._others_noted = True

    def _speak(self, wait: Wait | None) -> None:
        last = threading.Timer(_LAST_SECONDS, os._exit, (EXIT_CODE,))
        last.daemon = True
        last.start()
        sentence = self._sentence(wait)
        sys.stdout.flush()
        if self.faults is None:
            _print(f"{self._name}: {sentence}\n{_stack()}")
            os._exit(EXIT_CODE)
        said = self.faults.says(sentence)
        _print(f"{said}\n{_stack()}")
        with contextlib.suppress(Exception):
            self.faults.note(said)
        # On every host one sums up: the first of all may be on one that is cut off.
        sums_up = self.faults.claim(f"deadline-{self.faults.host}", said)
        first = sums_up and self.faults.claim("deadline", said)
        self.faults.claim("first", said)  # what their main threads, woken as the first ends, name
        hear = 2 * (_LOCAL_SECONDS if self.faults.is_local else _REMOTE_SECONDS) + 1.5
        self._stop.wait(hear)
        if sums_up:
            self._sum_up(self.faults, said, record=first)
        if not first:
            self._stop.wait(2.0)  # the first ends last
        self._stop.wait(0.5)
        os._exit(EXIT_CODE)

    def _sentence(self, wait: Wait | None) -> str:
        now, waits = self.waits.clock(), self.waits
        step = "before training" if waits.step is None else f"after step {waits.step}"
        if wait is None:
            return (
                f"{step}, not waiting for other ranks: in its own code for "
                f"{now - waits.moved:.1f} s, after {waits.last}"
            )
        waited, most = f"{now - wait.since:.1f} s", f"{wait.limit:g} s"
        return f"{step}, waiting in {wait.call} for {waited} (at most {most})"

    def _sum_up(self, faults: Faults, said: str, *, record: bool) -> None:
        noted = {faults.rank: said}
        with contextlib.suppress(Exception):
            noted |= faults.noted()
        size, local = faults.communicator.size, faults.communicator.local_size
        silent = [rank for rank in range(size) if rank not in noted]
        elsewhere = f", or on a host that does not share {faults.url}" if local < size else ""
        lines = [noted[rank] for rank in sorted(noted)]
        if silent:
            names = ", ".join(map(str, silent))
            lines.append(f"rank {names}: did not speak: stopped, hung or dead{elsewhere}")
        head = (
            "A wait for other ranks took too long "
            f"(run.timeout={self.waits.timeout:g} s); all ranks end."
        )
        tail = f"Python stacks: {faults.url}/rank-N.txt. Raise run.timeout if they were only slow."
        _print("\n".join([head, *(f"  {line}" for line in lines), tail]))
        if not record:
            return
        with contextlib.suppress(Exception):
            faults.deadline(EXIT_CODE, f"{head} {'; '.join(lines)}", self.waits.step)


def _stack() -> str:
    """The main thread's; those of all threads are in rank-N.txt."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = traceback.format_stack(frame) if frame is not None else []
    return "Python stack of the main thread (most recent call last):\n" + "".join(lines).rstrip()


def _print(text: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
