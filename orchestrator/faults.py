"""What ranks leave for each other when something is wrong: files; there are none before."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from orchestrator import storage
from orchestrator.agreement import RankError
from orchestrator.communicators.base import Communicator
from orchestrator.config import SettingError
from orchestrator.events import Events, write_outcome

# A dead rank's own words, and its launcher's, come first. Not long: in Gloo's ring the next rank
# learns of it only as this one ends, and horovodrun kills all after 5 s.
_HEAR_SECONDS = 1.0
_HOLD_SECONDS = 0.5


class Faults:
    """How a rank fails: the first says why, the others that they ended since it did.

    Args:
        communicator: The ranks.
        launch: A name that all ranks of this launch agree on, and no other launch has.

    Attributes:
        url: Where a rank's notes go: a temporary folder of the host, until `record_in`.
        events: Where rank 0 records what the run decides; `None` without a run directory.
        host: This one's name.
    """

    def __init__(self, communicator: Communicator, launch: str) -> None:
        self.communicator = communicator
        self.url = str(Path(tempfile.gettempdir(), f"orchestrator-faults-{launch}"))
        self._claims = self.url  # local: only there a file can be claimed
        self._run_dir: str | None = None
        self.events: Events | None = None
        self._ours: set[str] = set()
        self.host = socket.gethostname()

    def record_in(self, run_dir: str) -> None:
        """Leaves notes and the outcome in a run directory from now on; called by all ranks."""
        self.url = storage.join(run_dir, "faults")
        self._run_dir = run_dir
        if self.is_local:
            self._claims = self._path()

    @property
    def is_local(self) -> bool:
        """Whether notes are files of this host, or of a disk it shares."""
        return isinstance(storage.resolve(self.url)[0], storage.LocalFileSystem)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.communicator.rank

    def _path(self) -> str:
        return storage.resolve(self.url)[1]

    def says(self, sentence: str) -> str:
        """A sentence of this rank's, with its name in front."""
        return f"rank {self.rank} ({self.host}, process {os.getpid()}): {sentence}"

    def note(self, sentence: str) -> None:
        """Writes rank-N.txt: one line, then every thread's Python stack."""

        def write(path: str) -> None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(sentence + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

        storage.replace(storage.join(self.url, f"rank-{self.rank}.txt"), write)

    def noted(self) -> dict[int, str]:
        """The first line that each rank has written."""
        fs, path = storage.resolve(self.url)
        found: dict[int, str] = {}
        fs.invalidate_cache()
        for rank in range(self.communicator.size):
            with contextlib.suppress(OSError):
                text = fs.cat_file(f"{path}/rank-{rank}.txt").decode("utf-8", "replace")
                found[rank] = text.split("\n")[0]
        return found

    def others_noted(self) -> bool:
        """Whether another rank has written: one listing."""
        fs, path = storage.resolve(self.url)
        fs.invalidate_cache()
        try:
            names = [os.path.basename(str(one)) for one in fs.ls(path, detail=False)]
        except Exception:  # noqa: BLE001 - storage that fails is no news of another rank
            return False
        mine = f"rank-{self.rank}.txt"
        return any(n.startswith("rank-") and n.endswith(".txt") and n != mine for n in names)

    def claim(self, what: str, sentence: str = "") -> bool:
        """Whether this rank is the first of its host to claim `what`; another time, the same."""
        if what in self._ours:
            return True
        try:
            os.makedirs(self._claims, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(os.path.join(self._claims, f"{what}.txt"), flags, 0o644)
        except FileExistsError:
            return False
        except OSError:
            return True  # nothing can be written, so better said twice
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(sentence + "\n")
        self._ours.add(what)
        return True

    @property
    def is_recorded(self) -> bool:
        """Whether some rank has recorded, for all, that they end at a deadline."""
        return os.path.exists(os.path.join(self._claims, "deadline.txt"))

    def first(self, wait: float = 0.0) -> str:
        """What the first rank to fail said; nothing if none has after so many seconds."""
        end = time.monotonic() + wait
        while True:
            with contextlib.suppress(OSError):
                text = Path(self._claims, "first.txt").read_text("utf-8", "replace")
                if text.endswith("\n"):
                    return text.strip()
            if time.monotonic() >= end:
                return ""
            time.sleep(0.05)

    def is_secondary(self, error: BaseException) -> bool:
        """Whether an error says only that another rank failed."""
        return isinstance(error, RankError) or self.communicator.lost(error)

    def reason(self, error: BaseException) -> str:
        """Why the ranks end: this rank's error, or what the first that failed said."""
        mine = f"{type(error).__name__}: {_shortened(error)}"
        if not self.is_secondary(error):
            return mine
        if said := self.first(_HEAR_SECONDS):
            return said
        if isinstance(error, RankError):
            return mine
        return (
            "lost another rank, which ended without a word: killed, or crashed; the launcher "
            "names its code"
        )

    def record(self, error: BaseException) -> None:
        """Writes outcome.json for what no other rank has told yet; for ranks other than 0."""
        if self._run_dir is None or isinstance(error, SettingError | RankError):
            return
        reason = self.says(self.reason(error))
        if self.is_secondary(error) and self.first():
            return
        if self.claim("first", reason):
            self._outcome(1, reason, None)

    def deadline(self, code: int, reason: str, step: int | None) -> None:
        """Records that the ranks end at a deadline, from any rank: an event, and outcome.json."""
        if self._run_dir is None:
            return
        self._outcome(code, reason, step)
        values = {"epoch": None, "step": step, "rank": self.rank}
        if self.events is not None:
            self.events.emit("fault", **values, reason=reason)
        elif self.is_local:  # elsewhere a line is added by writing all anew, which is rank 0's
            line = json.dumps({"time": time.time(), **values, "kind": "fault", "reason": reason})
            storage.Lines(storage.join(self._run_dir, "events.jsonl"), keep=True).append(line)

    def _outcome(self, code: int, reason: str, step: int | None) -> None:
        write_outcome(self._run_dir or "", code, reason, step=step)

    def fail(self, error: BaseException) -> NoReturn:
        """Says why this rank ends, and ends all: in full on the first that failed, else a line."""
        ignore_signals()
        if self.is_secondary(error):
            _print(self.says(f"ended since another rank did: {self.reason(error)}"))
            time.sleep(_HOLD_SECONDS)
        elif self.claim("first", self.says(self.reason(error))):
            text = "".join(traceback.format_exception(error))
            _print(f"{text.rstrip()}\n{self.says('failed as above; all ranks end')}")
        else:
            _print(self.says(f"failed as well: {self.reason(error)}"))
            time.sleep(_HOLD_SECONDS)
        self.communicator.abort(1)
        os._exit(1)


def set_aside(run_dir: str) -> None:
    """Renames the notes of an earlier start, if there are any; on rank 0, before training."""
    fs, path = storage.resolve(storage.join(run_dir, "faults"))
    if fs.exists(path):
        fs.mv(path, f"{path}-before-{time.strftime('%Y%m%dT%H%M%S')}", recursive=True)


def ignore_signals() -> None:
    """The launcher ends the other ranks once one has failed: they are ending already."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _shortened(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:180]} ... {text[-120:]}"


def _print(text: str) -> None:
    # In one write, so that ranks' lines do not mix.
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
