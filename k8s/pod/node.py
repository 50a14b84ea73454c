"""PID 1 of an Indexed Job's pod: this node's ranks, which meet the others' at index 0.

Needs neither an operator nor ssh. Every pod starts its own ranks once all pods are there, passes
SIGTERM on to them, and ends with one exit code that all pods share: 75 from any of them starts
all of them again, and no index is left behind as completed while another is repeated.

    JOB_COMPLETION_INDEX=1 python node.py --nodes 4 --ranks 8 --first train-0.train -- COMMAND...
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
from types import FrameType

# Beside this file, wherever that is: it is no package.
from meeting import Meeting, ask, verdict

_POLL = 0.2
# Without a word from index 0 it is gone.
_SILENCE_SECONDS = 30.0


def default_interface() -> str | None:
    """The network interface of the default route."""
    try:
        with open("/proc/net/route", encoding="ascii") as table:
            rows = [line.split() for line in table][1:]
    except OSError:
        return None
    return next((row[0] for row in rows if row[1] == "00000000"), None)


def rank_environment(options: argparse.Namespace, index: int, local_rank: int) -> dict[str, str]:
    """What `horovodrun` would tell a Gloo rank."""
    numbers = {
        "RANK": index * options.ranks + local_rank,
        "SIZE": options.nodes * options.ranks,
        "LOCAL_RANK": local_rank,
        "LOCAL_SIZE": options.ranks,
        "CROSS_RANK": index,
        "CROSS_SIZE": options.nodes,
        "GLOO_RENDEZVOUS_PORT": options.port,
    }
    words = {
        "HOSTNAME": f"node-{index}",
        "GLOO_RENDEZVOUS_ADDR": options.first,
        "CONTROLLER": "gloo",
        "CPU_OPERATIONS": "gloo",
    }
    interface = options.interface or default_interface()
    words |= {"GLOO_IFACE": interface} if interface else {}
    return {f"HOROVOD_{name}": str(value) for name, value in (numbers | words).items()}


class Node:
    """This pod's part of the run.

    Args:
        options: The command line.
        index: This pod's completion index.
    """

    def __init__(self, options: argparse.Namespace, index: int) -> None:
        self._options = options
        self._index = index
        self._token = secrets.token_hex(8)
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._asked_at: float | None = None
        self._meeting = Meeting(options.nodes, options.port) if index == 0 else None
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def run(self) -> int:
        """Gives the exit code of the whole run."""
        if not self._meet():
            return 1 if self._asked_at is None else 128 + signal.SIGTERM
        for local_rank in range(self._options.ranks):
            more = rank_environment(self._options, self._index, local_rank)
            self._ranks.append(subprocess.Popen(self._options.command, env={**os.environ, **more}))
        self._see_through()
        code = worst([rank.returncode for rank in self._ranks])
        return self._agree(code)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            for rank in self._ranks:
                rank.send_signal(signal.SIGTERM)

    def _meet(self) -> bool:
        """Whether all nodes came in time; the run before this one has to be over first."""
        end = time.monotonic() + self._options.timeout
        say(f"node {self._index} of {self._options.nodes} waits for the others")
        while time.monotonic() < end and self._asked_at is None:
            joined = self._ask_first("PUT", f"/members/{self._index}", self._token)
            if joined == 200 and self._ask_first("GET", "/members") == 200:
                return True
            time.sleep(_POLL)
        if self._asked_at is None:
            say(f"not all of {self._options.nodes} nodes met in {self._options.timeout:g} s")
        return False

    def _see_through(self) -> None:
        """Returns when no rank is left here: ended, or killed past its time."""
        kill_at = None
        while any(rank.poll() is None for rank in self._ranks):
            now = time.monotonic()
            if kill_at is None and self._broken():
                kill_at = now + self._options.linger
            if self._asked_at is not None:
                kill_at = min(kill_at or float("inf"), self._asked_at + self._options.grace)
            if kill_at is not None and now >= kill_at:
                say("killing ranks that did not end in time")
                for rank in self._ranks:
                    rank.kill()
                kill_at = float("inf")
            time.sleep(_POLL)

    def _broken(self) -> bool:
        if self._meeting is not None and self._meeting.lost is not None:
            return True
        return any(rank.returncode for rank in self._ranks)

    def _agree(self, code: int) -> int:
        """Tells index 0 how this node's ranks ended, and hears what that makes for all."""
        if self._meeting is not None:
            self._meeting.ended(self._index, code)
            all_said = self._meeting.wait_for_all_ends(self._options.grace)
            if not all_said:
                missing = set(range(self._options.nodes)) - set(self._meeting.codes)
                say(f"nodes {sorted(missing)} did not say how they ended")
                return code or 1
        silent_since = time.monotonic()
        told = False
        while time.monotonic() - silent_since < _SILENCE_SECONDS:
            told = told or self._ask_first("PUT", f"/ends/{self._index}", str(code)) == 200
            found = ask(self._options.first, self._options.port, "GET", f"/ends/{self._index}")
            if found is not None:
                silent_since = time.monotonic()
                if found[0] == 200:
                    if self._meeting is not None:
                        self._meeting.wait_until_heard(_SILENCE_SECONDS)
                    return int(found[1])
            time.sleep(_POLL)
        return code or 1

    def _ask_first(self, method: str, path: str, body: str = "") -> int:
        answer = ask(self._options.first, self._options.port, method, path, body)
        return answer[0] if answer is not None else 0


def worst(codes: list[int]) -> int:
    """One exit code for this node's ranks, by the same rule as for all nodes; 128+N for signals."""
    return verdict({rank: code if code >= 0 else 128 - code for rank, code in enumerate(codes)})


def say(text: str) -> None:
    """One line to the pod's log."""
    print(f"node: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs this pod's part; 2 for a wrong call."""
    parser = argparse.ArgumentParser(description="This node's ranks of an Indexed Job.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, default=1, help="on each node (%(default)s)")
    parser.add_argument("--first", required=True, help="the host name of the pod of index 0")
    parser.add_argument("--port", type=int, default=29400, help="of index 0 (%(default)s)")
    parser.add_argument("--grace", type=float, default=35.0, help="seconds (%(default)s)")
    parser.add_argument(
        "--linger", type=float, default=30.0, help="of the others after one failed, seconds"
    )
    parser.add_argument("--timeout", type=float, default=1800.0, help="for all to come, seconds")
    parser.add_argument("--interface", help="of the network; the default route's")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    index = os.environ.get("JOB_COMPLETION_INDEX", "")
    if not index.isdigit() or int(index) >= options.nodes or not options.command:
        say(
            f"JOB_COMPLETION_INDEX={index!r} must be below --nodes {options.nodes}, and a command "
            "must follow --: is the Job's completionMode Indexed?"
        )
        return 2
    return Node(options, int(index)).run()


if __name__ == "__main__":
    sys.exit(main())
