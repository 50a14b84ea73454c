"""A doctor with one rank that differs: `python -m tests.distributed.lame RANK how [words]`."""

from __future__ import annotations

import os
import resource
import sys

import orchestrator
from orchestrator import backends, cli
from orchestrator.doctor import host


def differ(how: str) -> None:
    if how == "version":
        orchestrator.__version__ = "0.0.1"  # Horovod itself looks at Keras's
    if how == "files":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    if how == "raise":
        host.cpus = lambda: 1 // 0


def main(rank: int, how: str, words: list[str]) -> None:
    mine = backends.launched_rank()
    if mine == rank:
        differ(how)
    sys.argv[1:] = ["doctor", *words]
    try:
        cli.main()
    except SystemExit as ended:
        os.write(2, f"rank {mine} ends with {ended.code}\n".encode())
        raise


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
