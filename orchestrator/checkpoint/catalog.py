"""What a store holds, and the values its users get. Reads only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.checkpoint import manifest
from orchestrator.checkpoint.inventory import Inventory
from orchestrator.checkpoint.local import BrokenCheckpointError, LocalPlace
from orchestrator.checkpoint.objects import ObjectPlace

Place = LocalPlace | ObjectPlace
Report = Callable[[int, str], None]
# What a definite look at a checkpoint finds wrong. Errors of the network are not among them:
# they must never make a checkpoint pass for broken.
BROKEN = (manifest.InvalidManifestError, BrokenCheckpointError)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        step: Optimizer steps done.
        epoch: From 0, or `None`.
        metrics: By name.
        url: The step's folder.
        manifest: All that is recorded.
    """

    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    url: str
    manifest: manifest.Manifest


class Fetched(NamedTuple):
    """A checkpoint and the local folder with its verified files."""

    checkpoint: Checkpoint
    folder: str


@dataclass(frozen=True)
class Verdict:
    """What `verify` found at a step.

    Attributes:
        step: The step.
        problem: What is wrong; `None` if the checkpoint is whole.
    """

    step: int
    problem: str | None


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed.

    Attributes:
        steps: Checkpoints that no policy keeps.
        leftovers: Files, uploads, spools and empty folders of dead writers.
    """

    steps: tuple[int, ...]
    leftovers: tuple[str, ...]


class Catalog:
    """Reads the manifests of a store.

    Args:
        url: The store's, for messages.
        place: Where its files are.

    Attributes:
        known: Steps that were committed at the first look, or by this run since; `None` before.
    """

    def __init__(self, url: str, place: Place) -> None:
        self.url = url
        self.place = place
        self.known: set[int] | None = None

    def inventory(self) -> Inventory:
        """A fresh listing."""
        inventory = Inventory(self.place.tree())
        if self.known is None:
            self.known = set(inventory.committed)
        return inventory

    def load(self, step: int) -> manifest.Manifest:
        """A step's manifest.

        Raises:
            BrokenCheckpointError: There is none.
            InvalidManifestError: It is not valid.
        """
        try:
            data = self.place.read(f"{manifest.folder(step)}/{manifest.NAME}")
        except FileNotFoundError:
            raise BrokenCheckpointError("there is no manifest: the save was not finished") from None
        return manifest.decode(data, step)

    def read(self, step: int) -> manifest.Manifest | None:
        """A step's manifest; `None` if it is missing or not valid."""
        try:
            return self.load(step)
        except BROKEN as error:
            logging.getLogger(__name__).debug("%s: step %d: %s", self.url, step, error)
            return None

    def whole(self) -> list[manifest.Manifest]:
        """The checkpoints whose manifest is valid and whose files are there, sizes right."""
        inventory = self.inventory()
        found = [self.read(step) for step in sorted(inventory.committed)]
        return [one for one in found if one is not None and inventory.problem(one) is None]

    def problem(self, step: int) -> str | None:
        """What is wrong with a step, after reading every byte of it; `None` if nothing."""
        try:
            self.place.verify(manifest.folder(step), self.load(step))
        except BROKEN as error:
            return str(error)
        return None

    def of_newer_version(self, step: int) -> bool:
        """Whether a step was written by a newer version, whose format cannot be judged."""
        try:
            self.load(step)
        except manifest.UnknownFormatError:
            return True
        except BROKEN:
            pass
        return False

    def checkpoint(self, found: manifest.Manifest) -> Checkpoint:
        """A manifest as the store's users get it."""
        url = f"{self.url}/{manifest.folder(found.step)}"
        return Checkpoint(found.step, found.epoch, dict(found.metrics), url, found)
