"""From a launcher's ranks to a report: joins them, has them look and measure, and judges."""

from __future__ import annotations

import dataclasses
import secrets

import tensorflow as tf

from orchestrator import agreement, backends
from orchestrator.communicators.base import Communicator
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.config import BACKENDS, SettingError
from orchestrator.doctor import facts, host, measure, stored
from orchestrator.doctor.judge import judge
from orchestrator.doctor.report import Facts, Report, Seen
from orchestrator.faults import Faults

# A wait for other ranks may last three times that: nobody has made a training step.
TIMEOUT_SECONDS = 60.0


def examine(backend: str, url: str | None, folder: str) -> Report:
    """Looks at the ranks and what is between them; called by all ranks, once in a process.

    The ranks make the same collectives whatever each finds, and get the same findings. A rank
    that fails ends all, as in training.

    Args:
        backend: As `init` takes it.
        url: Where storage is tried, by rank 0; `None` to leave it out.
        folder: Whose disk is looked at.

    Raises:
        SettingError: An unknown backend, or `folder` cannot be one.
    """
    if backend not in BACKENDS:
        raise SettingError(f"--backend {backend} is unknown. Allowed: {', '.join(BACKENDS)}.")
    host.space(folder)  # a wrong word is refused before ranks wait for each other
    chosen = backends.detect(backends.visible_gpus()) if backend == "auto" else backend
    try:
        communicator, deadline = backends.join(chosen, TIMEOUT_SECONDS)
    except Exception as error:  # noqa: BLE001 - whatever the library raises is the finding
        return _apart(chosen, folder, error)
    if deadline is None:
        return _together(communicator, chosen, url, folder)
    faults = Faults(communicator, communicator.broadcast_object(secrets.token_hex(8)))
    deadline.faults = faults
    try:
        return _together(communicator, chosen, url, folder)
    except Exception as error:  # noqa: BLE001 - the other ranks wait for this one
        faults.fail(error)
    finally:
        deadline.stop()


def _together(communicator: Communicator, backend: str, url: str | None, folder: str) -> Report:
    ranks = communicator.allgather_object(facts.of_this_rank(communicator, backend, folder))
    device, collectives, clocks = "", [], []
    if communicator.size > 1:
        device = _place(communicator, ranks)
        collectives = measure.collectives(communicator, device)
        clocks = measure.clocks(communicator)
    storage = agreement.on_root(communicator, lambda: stored.check(url)) if url else None
    seen = Seen(
        backend=backend,
        size=communicator.size,
        ranks=ranks,
        device=device,
        collectives=collectives,
        clocks=clocks,
        storage=storage,
    )
    findings = agreement.on_root(communicator, lambda: judge(seen))
    return Report(seen=seen, findings=findings, rank=communicator.rank)


def _place(communicator: Communicator, ranks: list[Facts]) -> str:
    """Where to measure: on each rank's own GPU if every rank has one, as training would."""
    if all(len(facts.gpu_names) >= facts.local_size for facts in ranks):
        backends.pin_gpu(ranks[communicator.rank].gpus, communicator)
        return "/GPU:0"
    if ranks[communicator.rank].gpus:
        tf.config.set_visible_devices([], "GPU")
    else:
        backends.pin_gpu(0, communicator)
    return "/CPU:0"


def _apart(backend: str, folder: str, error: Exception) -> Report:
    """What this process alone can say, at once, where the ranks cannot join."""
    rank = backends.launched_rank()
    mine = dataclasses.replace(facts.of_this_rank(SingleCommunicator(), backend, folder), rank=rank)
    size = backends.launched_size() or 1
    seen = Seen(backend=backend, size=size, ranks=[mine], apart=str(error))
    return Report(seen=seen, findings=judge(seen), rank=rank)
