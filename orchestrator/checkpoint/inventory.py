"""What lies in a store, as one listing had it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from orchestrator.checkpoint import manifest
from orchestrator.checkpoint.local import Item
from orchestrator.storage import PREFLIGHT


class Inventory:
    """A listing of a store, by steps.

    Args:
        tree: Files by their path relative to the store.

    Attributes:
        steps: Steps with any file.
        committed: Steps with a manifest, valid or not.
    """

    def __init__(self, tree: Mapping[str, Item]) -> None:
        self._tree = tree
        self._below: dict[int, list[str]] = defaultdict(list)
        for path in tree:
            step = manifest.step_of(path.split("/")[0])
            if step is not None and "/" in path:
                self._below[step].append(path)
        self.steps = set(self._below)
        self.committed = {
            step for step in self.steps if f"{manifest.folder(step)}/{manifest.NAME}" in tree
        }

    def problem(self, found: manifest.Manifest) -> str | None:
        """What is wrong with a checkpoint, as far as names and sizes tell; `None` if nothing."""
        for file in found.files:
            item = self._tree.get(f"{manifest.folder(found.step)}/{found.path(file)}")
            if item is None:
                return f"{file.name} is missing"
            if item.size != file.size:
                return f"{file.name} has {item.size} bytes instead of {file.size}"
        return None

    def leftovers(
        self, whole: Iterable[manifest.Manifest], untouched: Iterable[int], before: float
    ) -> list[str]:
        """Files that are no part of a whole checkpoint, manifests first.

        Args:
            whole: The manifests of the whole checkpoints.
            untouched: Steps that this version cannot judge.
            before: Files of one attempt go together, once the youngest is older than this.
        """
        skipped = set(untouched)
        needed = {
            f"{manifest.folder(one.step)}/{name}"
            for one in whole
            for name in (manifest.NAME, *map(one.path, one.files))
        }
        groups: dict[str, list[str]] = defaultdict(list)
        for step in sorted(self.steps - skipped):
            for path in self._below[step]:
                if path not in needed:
                    groups["/".join(path.split("/")[:2])].append(path)
        for path in self._tree:
            if path.startswith(PREFLIGHT):
                groups[path].append(path)
        old = [
            path
            for paths in groups.values()
            if max(self._tree[path].time for path in paths) < before
            for path in sorted(paths)
        ]
        return sorted(old, key=lambda path: (not path.endswith(f"/{manifest.NAME}"), path))
