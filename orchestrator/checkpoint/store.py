"""Whole checkpoints at a URL: saved, found again, verified, thinned out. Rank 0 only.

One rule everywhere: data files first, under the step's prefix and a token of the attempt's own,
then the manifest as the last write, which never replaces another. Without a valid manifest there
is no checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from orchestrator import storage
from orchestrator.checkpoint import manifest, retention, saving
from orchestrator.checkpoint.catalog import (
    BROKEN,
    Catalog,
    Checkpoint,
    Fetched,
    Pruned,
    Report,
    Verdict,
)
from orchestrator.checkpoint.local import LocalPlace, Writers
from orchestrator.checkpoint.objects import ObjectPlace
from orchestrator.retries import Retry

DAY = 86400.0


class CheckpointStore:
    """Checkpoints below one URL. It neither communicates nor knows what a file contains.

    Args:
        url: Any fsspec URL or local path; `file`, `memory`, `s3` and `gs` are tested.
        retry: For transient errors; by default within a minute.
        spool: A local folder for files on their way to and from an object store; by default the
            system's temporary one. It holds one file being saved, or one checkpoint being read.
        clock: Seconds since 1970.
        **storage_options: For the filesystem, such as `endpoint_url`.

    Raises:
        SettingError: The package for this kind of URL is missing; the error names the extra.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        retry: Retry | None = None,
        spool: str | None = None,
        clock: Callable[[], float] = time.time,
        **storage_options: Any,
    ) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        self._options = storage_options
        self._retry = retry or Retry()
        self._clock = clock
        fs, path = storage.resolve(self.url, storage_options)
        if isinstance(fs, LocalFileSystem):
            place = LocalPlace(path)
        else:
            place = ObjectPlace(fs, path, self._retry, spool)
        self._catalog = Catalog(self.url, place)

    def preflight(self) -> None:
        """Writes, reads and deletes a small object in the store.

        Raises:
            SettingError: No permission, no such bucket, a read-only disk; it says what to do.
            OSError: The store is full or cannot be reached.
        """
        storage.preflight(self.url, self._options, self._retry)
        with storage.explained(self.url):
            self._catalog.inventory()

    def save(
        self,
        files: Writers,
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        world_size: int = 1,
    ) -> Checkpoint:
        """Saves a checkpoint, whole or not at all.

        Saving a step again gives back the checkpoint that is there if it is this process's own or
        has byte-equal files, and replaces one that is no longer whole.

        Args:
            files: A file's name (`model.weights.h5`) and what writes it at a local path. It may
                give back the file's SHA-256; else the file is read again for it.
            step: Optimizer steps done.
            epoch: From 0.
            metrics: By name, for `best` and retention.
            world_size: Ranks of the run.

        Raises:
            ConflictError: Another run has committed this step or one that was not here before.
            SettingError: No permission, no such bucket, a read-only disk; it says what to do.
            OSError: The disk is full, or transient errors outlasted the budget.
            ValueError: A file's name or another argument is not allowed.
        """
        draft = saving.draft(files, step, epoch, metrics, world_size)
        with storage.explained(self.url):
            return self._catalog.checkpoint(saving.save(self._catalog, draft, files, self._clock))

    def list(self) -> Sequence[Checkpoint]:
        """All committed checkpoints, ascending by step; their files are not looked at."""
        with storage.explained(self.url):
            committed = sorted(self._catalog.inventory().committed)
            found = [self._catalog.read(step) for step in committed]
        return [self._catalog.checkpoint(one) for one in found if one is not None]

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, judged by manifest, names and sizes; `None` without one."""
        with storage.explained(self.url):
            inventory = self._catalog.inventory()
            for step in sorted(inventory.committed, reverse=True):
                found = self._catalog.read(step)
                if found is not None and inventory.problem(found) is None:
                    return self._catalog.checkpoint(found)
        return None

    def best(self, monitor: str, mode: retention.Mode = "min") -> Checkpoint | None:
        """The whole checkpoint with the best metric, of equals the earliest; `None` without one.

        Args:
            monitor: The metric's name.
            mode: Whether less (`min`) or more (`max`) is better.
        """
        policy = retention.Best(monitor, mode)
        with storage.explained(self.url):
            whole = {one.step: one for one in self._catalog.whole()}
        for step in policy.keep(_entries(whole.values())):
            return self._catalog.checkpoint(whole[step])
        return None

    @contextlib.contextmanager
    def fetch(self, checkpoint: Checkpoint) -> Iterator[str]:
        """A local folder with the checkpoint's files, each verified by size and SHA-256.

        On a local disk it is where they lie, not to be changed; else a copy, removed at the end.

        Raises:
            BrokenCheckpointError: A file is not what the manifest says.
        """
        with contextlib.ExitStack() as stack:
            with storage.explained(self.url):
                place = self._catalog.place
                fetching = place.fetch(manifest.folder(checkpoint.step), checkpoint.manifest)
                folder = stack.enter_context(fetching)
            yield folder

    @contextlib.contextmanager
    def newest(self, report: Report | None = None) -> Iterator[Fetched | None]:
        """The newest checkpoint whose every byte verifies, fetched; `None` if there is none.

        Args:
            report: Called with the step and what is wrong for each newer one that is passed
                over, unfinished ones included. It is logged in any case.
        """
        with contextlib.ExitStack() as stack:
            yield self._newest(stack, report)

    def _newest(self, stack: contextlib.ExitStack, report: Report | None) -> Fetched | None:
        with storage.explained(self.url):
            steps = self._catalog.inventory().steps
        for step in sorted(steps, reverse=True):
            try:
                with storage.explained(self.url):
                    checkpoint = self._catalog.checkpoint(self._catalog.load(step))
                return Fetched(checkpoint, stack.enter_context(self.fetch(checkpoint)))
            except BROKEN as error:
                logging.getLogger(__name__).warning(
                    "%s: step %d is passed over: %s", self.url, step, error
                )
                if report is not None:
                    report(step, str(error))
        return None

    def verify(self) -> Sequence[Verdict]:
        """Reads and hashes every byte of every step, and loads nothing.

        Returns:
            For each step that has any file, ascending: whole, or what is wrong.
        """
        with storage.explained(self.url):
            steps = sorted(self._catalog.inventory().steps)
            return [Verdict(step, self._catalog.problem(step)) for step in steps]

    def remove(self, checkpoint: Checkpoint) -> None:
        """Removes a checkpoint, its manifest first."""
        with storage.explained(self.url):
            self._remove(checkpoint.manifest)

    def prune(self, keep: Iterable[retention.Keep] = (), older_than: float = DAY) -> Pruned:
        """Removes checkpoints that no policy keeps, and what dead writers left.

        The newest whole checkpoint and each `Best`'s best always stay. A leftover is whatever is
        no part of a whole checkpoint: files of unfinished or broken ones, unfinished multipart
        uploads, spools on this machine. GCS ends unfinished uploads itself after a week.

        Args:
            keep: Policies of `retention`; none keep all checkpoints.
            older_than: Leftovers must be older, in seconds; a living writer's are younger.
        """
        with storage.explained(self.url):
            whole = {one.step: one for one in self._catalog.whole()}
            kept = retention.kept(keep, _entries(whole.values()))
            dropped = sorted(set(whole) - kept)
            for step in dropped:
                self._remove(whole[step])
            before = self._clock() - older_than
            leftovers = self._remove_leftovers([whole[step] for step in kept], before)
            leftovers += self._catalog.place.tidy(before)
        return Pruned(tuple(dropped), tuple(leftovers))

    def _remove(self, found: manifest.Manifest) -> None:
        # The manifest first, and for good: without it the rest is no checkpoint, whatever dies.
        folder = manifest.folder(found.step)
        self._catalog.place.delete([f"{folder}/{manifest.NAME}"])
        self._catalog.place.delete([f"{folder}/{found.path(file)}" for file in found.files])

    def _remove_leftovers(self, whole: Sequence[manifest.Manifest], before: float) -> Any:
        inventory = self._catalog.inventory()
        newer = [step for step in inventory.committed if self._catalog.of_newer_version(step)]
        paths = inventory.leftovers(whole, newer, before)
        self._catalog.place.delete([path for path in paths if path.endswith(manifest.NAME)])
        self._catalog.place.delete(paths)
        return paths


def _entries(whole: Iterable[manifest.Manifest]) -> Sequence[retention.Entry]:
    return [retention.Entry(one.step, one.metrics) for one in sorted(whole, key=lambda m: m.step)]
