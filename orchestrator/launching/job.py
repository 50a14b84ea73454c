"""One run of all ranks under a launcher: started, signalled, and ended with their own code."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Sequence

from orchestrator.launching import rank as ranks
from orchestrator.launching.hosts import LOOPBACK
from orchestrator.launching.outcome import PREEMPTED, Ended, Outcome, in_words, verdict

# From the first rank there to the last: a Python start from the slowest file system.
_START_SECONDS = 120.0
# What the others have once a rank has failed: as long as horovodrun gives them.
_FAILURE_SECONDS = 5.0
# What killed ranks have to be reported, and a launcher that is told to end.
_END_SECONDS = 2.0
_HANDSHAKE_SECONDS = 30.0


class Job:
    """Starts a launcher that starts `rank.py` for each rank, and speaks with each of them.

    Args:
        size: How many ranks.
        launcher: The launcher and its options, to be followed by what a rank runs.
        command: What each rank runs.
        addresses: Of this machine, where the ranks' hosts find it.
        grace: Seconds from a signal to the end of what is still running.
    """

    def __init__(
        self,
        size: int,
        launcher: Sequence[str],
        command: Sequence[str],
        addresses: Sequence[str],
        grace: float,
    ) -> None:
        self._size = size
        self._name = os.path.basename(launcher[0])
        self._words = [*launcher, sys.executable, "-IS", os.path.abspath(ranks.__file__), *command]
        self._addresses = addresses
        self._grace = grace
        self._secret = secrets.token_hex(16)
        self._ranks: dict[int, asyncio.StreamWriter] = {}
        self._ended: list[Ended] = []
        self._by_launcher: set[int] = set()
        self._started = False
        self._over = asyncio.Event()
        self._problem: Outcome | None = None
        self._signal: int | None = None
        self._end_at = math.inf
        self._killing = ""

    def signal(self, number: int) -> None:
        """Tells all ranks, and kills what is left after the grace.

        Before all ranks are there none has started, and none will.
        """
        name = signal.Signals(number).name
        if not self._started:
            # An interrupt is a user's, who would not want it started again.
            code = 128 + number if number == signal.SIGINT else PREEMPTED
            self._give_up(code, f"{name} before the ranks had started")
            return
        self._signal = self._signal or number
        self._tell_all(f"signal {number}")
        self._end_within(self._grace, f"still running {self._grace:g} s after {name} (--grace)")

    def kill(self, why: str) -> None:
        """Kills all ranks at once."""
        self._end_within(0.0, why)

    async def run(self) -> Outcome:
        """Returns when no rank is left, nor the launcher."""
        here = LOOPBACK if list(self._addresses) == [LOOPBACK] else "0.0.0.0"
        server = await asyncio.start_server(self._serve, here, 0)
        port = server.sockets[0].getsockname()[1]
        told = ",".join([self._secret, f"{self._grace:g}", str(port), *self._addresses])
        try:
            # A session of its own: a terminal's or container's signals are for us alone.
            process = await asyncio.create_subprocess_exec(
                *self._words,
                env={**os.environ, ranks.VARIABLE: told},
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            waiting = asyncio.create_task(process.wait())
            waiting.add_done_callback(lambda task: self._launcher_ended(task.result()))
            await self._over.wait()
            await self._end_launcher(process)
            launcher_code = _code(await waiting)
        finally:
            server.close()
            for writer in self._ranks.values():
                writer.close()
        outcome = self._problem or verdict([*self._ended, *self._silent()])
        if self._name == "mpiexec" and outcome.rank in self._by_launcher and launcher_code:
            # All at once, so which rank was first says nothing; its own output tells.
            how = (
                f"mpiexec killed the ranks, as MPI_Abort has it do, and ended with {launcher_code}"
            )
            return Outcome(launcher_code, how)
        return outcome

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One rank: introduced, then heard until it has ended or its connection has."""
        rank = None
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                rank = await self._meet(reader, writer)
            self._joined(rank, writer)
            report = json.loads(await reader.readline())
            code, problem = int(report["code"]), str(report["problem"])
            self._by_launcher |= {rank} if report["by_launcher"] else set()
        except (OSError, EOFError, TimeoutError, ValueError, KeyError):
            if rank is None:  # not one of ours
                writer.close()
                return
            code, problem = 1, "was lost with its host, or with what ran it there"
        except asyncio.CancelledError:
            return  # all is over, with a rank unheard: Python 3.11 would print this as an error
        if self._killing and code == 128 + signal.SIGKILL:
            problem = f"was killed, {self._killing}"
        self._left(Ended(rank, code, problem or in_words(code)))

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        ours = secrets.token_hex(16)
        writer.write(f"{ours}\n".encode())
        rank, theirs, shown = (await reader.readline()).decode().split()
        if not hmac.compare_digest(shown, ranks.proof(self._secret, "rank", rank, ours)):
            raise ValueError("does not know the secret")
        if int(rank) in self._ranks or not 0 <= int(rank) < self._size:
            raise ValueError("no rank of this job, or there already")
        writer.write(f"{ranks.proof(self._secret, 'launcher', rank, theirs)}\n".encode())
        ranks.keep_alive(writer.get_extra_info("socket"))
        return int(rank)

    def _joined(self, rank: int, writer: asyncio.StreamWriter) -> None:
        self._ranks[rank] = writer
        if len(self._ranks) == 1:
            asyncio.get_running_loop().call_later(_START_SECONDS, self._start_is_late)
        if len(self._ranks) == self._size and not self._over.is_set():
            # Together, so that a signal finds either all of them or none.
            self._started = True
            self._tell_all("start")

    def _left(self, ended: Ended) -> None:
        self._ended.append(ended)
        if not self._started:
            self._give_up(1, f"rank {ended.rank} {ended.how} before all ranks had started")
        elif len(self._ended) == self._size:
            self._over.set()
        elif ended.code == PREEMPTED:
            why = f"still running {self._grace:g} s after rank {ended.rank} ended with {PREEMPTED}"
            self._end_within(self._grace, why)
        elif ended.code and self._signal is None:
            # After a signal another one may be writing the checkpoint: that has the grace.
            self._tell_all(f"signal {int(signal.SIGTERM)}")
            self._end_within(_FAILURE_SECONDS, f"as rank {ended.rank} had failed")

    def _silent(self) -> list[Ended]:
        """The ranks that were killed and never said so."""
        missing = sorted(set(self._ranks) - {ended.rank for ended in self._ended})
        how = f"did not answer when it was killed, {self._killing}"
        return [Ended(rank, 128 + signal.SIGKILL, how) for rank in missing if self._started]

    def _launcher_ended(self, code: int) -> None:
        if self._over.is_set():
            return
        if self._started:
            self._end_within(_FAILURE_SECONDS, f"as {self._name} had ended")
        else:
            why = f"{self._name} ended with {_code(code)} before all ranks had started"
            self._give_up(_code(code) or 1, why)

    def _start_is_late(self) -> None:
        if not self._started:
            there = f"{len(self._ranks)} of {self._size} ranks had started"
            self._give_up(1, f"only {there} {_START_SECONDS:g} s after the first")

    def _give_up(self, code: int, reason: str) -> None:
        if not self._over.is_set():
            self._problem = Outcome(code, reason)
            self._over.set()

    def _tell_all(self, words: str) -> None:
        for writer in self._ranks.values():
            writer.write(f"{words}\n".encode())

    def _end_within(self, seconds: float, why: str) -> None:
        """Kills what is left after so many seconds, or earlier where that was said before."""
        loop = asyncio.get_running_loop()
        if loop.time() + seconds < self._end_at:
            self._end_at = loop.time() + seconds
            loop.call_later(seconds, self._kill_all, self._end_at, why)

    def _kill_all(self, at: float, why: str) -> None:
        if at != self._end_at:  # an earlier one came since
            return
        self._killing = why
        self._tell_all("end")
        self._end_at = -math.inf
        # Who does not answer that is not waited for.
        asyncio.get_running_loop().call_later(_END_SECONDS, self._over.set)

    async def _end_launcher(self, process: asyncio.subprocess.Process) -> None:
        """Lets the ranks' supervisors go, which ends the launcher; else ends that."""
        if len(self._ended) == self._size:
            self._tell_all("leave")
            if await _ends(process, _FAILURE_SECONDS):
                return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        if not await _ends(process, _END_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # not its group: Python's resource tracker there cleans up


def _code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


async def _ends(process: asyncio.subprocess.Process, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.wait()
    return process.returncode is not None
