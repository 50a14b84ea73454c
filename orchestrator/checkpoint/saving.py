"""One save: the data files, the commit, and telling other writers from ourselves."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping

from orchestrator.checkpoint import manifest
from orchestrator.checkpoint.catalog import BROKEN, Catalog
from orchestrator.checkpoint.local import Writers
from orchestrator.config import SettingError

_LIBRARIES = ("keras-orchestrator", "keras", "tensorflow", "numpy", "horovod", "fsspec")
_PROCESS = secrets.token_hex(4)


class ConflictError(SettingError):
    """Another run writes checkpoints to the same URL."""


def writer() -> str:
    """This process, as its manifests name it: `host:pid:` and a token."""
    return f"{socket.gethostname()}:{os.getpid()}:{_PROCESS}"


def draft(
    files: Writers,
    step: int,
    epoch: int | None,
    metrics: Mapping[str, float] | None,
    world_size: int,
) -> manifest.Manifest:
    """The manifest of an attempt, its arguments checked, before it has files.

    Raises:
        ValueError: An argument or a file's name is not allowed.
    """
    for name in files:
        manifest.check_name(name)
    if not files:
        raise ValueError("files={} is not allowed: a checkpoint has at least one file.")
    return manifest.Manifest(
        step=int(step),
        token=secrets.token_hex(8),
        files=(),
        epoch=None if epoch is None else int(epoch),
        metrics={name: float(value) for name, value in (metrics or {}).items()},
        world_size=int(world_size),
        writer=writer(),
        libraries=dict(_libraries()),
    )


def save(
    catalog: Catalog, draft: manifest.Manifest, files: Writers, clock: Callable[[], float]
) -> manifest.Manifest:
    """Writes the files and commits them; returns what is committed then.

    Raises:
        ConflictError: Another run has committed this step, or one that was not here before.
    """
    _refuse_others(catalog)
    try:
        found = catalog.place.write(manifest.folder(draft.step), draft.token, files)
    except BaseException:
        _discard(catalog, draft)
        raise
    made = _commit(catalog, manifest.committed(draft, found, clock()))
    if catalog.known is not None:
        catalog.known.add(made.step)
    return made


def _refuse_others(catalog: Catalog) -> None:
    known = catalog.known
    inventory = catalog.inventory()
    if known is None:
        return
    for step in sorted(inventory.committed - known):
        other = catalog.read(step)
        if other is not None and other.writer != writer():
            raise _conflict(catalog, other, "a step that was not there before")


def _commit(catalog: Catalog, made: manifest.Manifest) -> manifest.Manifest:
    # When this raises for another reason than a conflict, the put may have arrived all the same:
    # the files stay.
    for _ in range(3):
        try:
            catalog.place.commit(manifest.folder(made.step), made.token, made.encode())
            return made
        except FileExistsError:
            there = _in_the_way(catalog, made.step)
        if there is not None and there.token == made.token:
            return made  # the answer to our own put got lost
        if there is not None:
            _discard(catalog, made)
            if there.writer == writer() or there.same_content(made):
                return there
            raise _conflict(catalog, there, "this step, with other content")
    _discard(catalog, made)
    raise ConflictError(f"{catalog.url}: step {made.step} is being written by another run too.")


def _in_the_way(catalog: Catalog, step: int) -> manifest.Manifest | None:
    """The manifest of a whole checkpoint of this step; one that is not whole is removed."""
    try:
        there = catalog.load(step)
        catalog.place.verify(manifest.folder(step), there)
        return there
    except manifest.UnknownFormatError as error:
        raise ConflictError(f"{catalog.url}: step {step} is taken: {error}") from None
    except BROKEN as error:
        _log().warning("%s: step %d is saved anew: %s", catalog.url, step, error)
        catalog.place.delete([f"{manifest.folder(step)}/{manifest.NAME}"])
    return None


def _discard(catalog: Catalog, made: manifest.Manifest) -> None:
    # So that a failed save takes no room. What cannot be removed now, prune finds.
    prefix = f"{manifest.folder(made.step)}/{made.token}/"
    try:
        place = catalog.place
        place.delete([path for path in place.tree() if path.startswith(prefix)])
    except Exception as error:  # noqa: BLE001 - the save's own error matters more
        _log().warning("%s/%s could not be removed: %r", catalog.url, prefix, error)


def _conflict(catalog: Catalog, other: manifest.Manifest, what: str) -> ConflictError:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(other.created))
    return ConflictError(
        f"{catalog.url}: {other.writer} committed step {other.step} on {when}, {what}. Another "
        "run writes here, or this one went on from an older checkpoint than the newest: give "
        "each run a folder of its own, or remove the newer checkpoints first."
    )


@functools.cache
def _libraries() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _log() -> logging.Logger:
    return logging.getLogger(__name__)
