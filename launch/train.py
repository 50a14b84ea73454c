"""Trains one settings file on any number of ranks, whatever launcher starts them.

`python launch/train.py [--config FILE] [key=value ...]`, and the same after `horovodrun -np 4` or
`mpiexec -n 4`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

# Before TensorFlow is imported: its start-up notes, on every rank, say nothing to a user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def import_tensorflow() -> None:
    """Imports TensorFlow without its C++ start-up notes, which no setting keeps off stderr."""
    with tempfile.TemporaryFile() as notes:
        stderr = os.dup(2)
        os.dup2(notes.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
        except BaseException:
            notes.seek(0)
            os.write(stderr, notes.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _end_early(number: int, frame: object) -> None:
    """Before training begins there is nothing to save: it can be started again as it was."""
    os.write(2, b"Preempted while starting or ending; the same command goes on.\n")
    os._exit(75)  # start it again


DIGITS = Path(__file__).parent / "configs" / "digits.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, trains, and gives the exit code.

    0; 2 for bad settings; 75 for a preempted run, to be started again; 1 for anything else.
    """
    parser = argparse.ArgumentParser(description="Train a Keras model on any number of ranks.")
    parser.add_argument("--config", default=DIGITS, help=f"settings file (default: {DIGITS})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="train.epochs=5")
    parsed = parser.parse_args(arguments)

    import_tensorflow()
    from orchestrator.backends import launched_local_rank, launched_rank
    from orchestrator.config import SettingError, load
    from orchestrator.preemption import EXIT_CODE, Preempted
    from orchestrator.training import start, train

    runtime = None
    try:
        settings = load(parsed.config, parsed.overrides)
        runtime = start(settings)
        train(settings, runtime)
    except SettingError as error:
        # Before the ranks have met it may be one host's alone.
        if (launched_local_rank() if runtime is None else launched_rank()) == 0:
            print(f"Settings error: {error}", file=sys.stderr, flush=True)
        return 2
    except Preempted as preempted:
        if launched_rank() == 0:
            print(preempted, file=sys.stderr, flush=True)
        return EXIT_CODE
    except Exception as error:  # noqa: BLE001 - printed, and turned into the exit code
        if runtime is not None and runtime.faults is not None:
            # Other ranks may be waiting in a collective; they end with this one.
            runtime.faults.fail(error)
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end_early)
    code = main()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a launcher's, on the way out: all is said
    sys.exit(code)
