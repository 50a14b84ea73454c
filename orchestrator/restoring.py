"""Checkpoints read once, for all ranks."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from orchestrator import storage, weights
from orchestrator.checkpoint import manifest
from orchestrator.checkpoint.catalog import Checkpoint, Fetched
from orchestrator.checkpoint.layout import WEIGHTS
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError
from orchestrator.resume import files, own
from orchestrator.runtime import Runtime, current


class Opened:
    """A whole checkpoint, its files open on rank 0, its training state on all ranks.

    Attributes:
        checkpoint: What it is.
        state: The training state; `None` where only weights were saved.
        passed_over: Newer checkpoints that are not whole, and why not.
    """

    def __init__(
        self,
        runtime: Runtime,
        checkpoint: Checkpoint,
        state: dict[str, Any] | None,
        passed_over: list[str],
        folder: str | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.checkpoint = checkpoint
        self.state = state
        self.passed_over = passed_over
        self._runtime = runtime
        self._folder = folder
        self._stack = stack

    def load(self, model: keras.Model) -> None:
        """Gives all ranks the weights and optimizer state; called by all ranks.

        Raises:
            Exception: Rank 0's own on rank 0, for instance where the model is another than the
                saved; RankError on the others.
        """

        def read() -> None:
            weights.state_variables(model)  # builds the optimizer, whose state is there as well
            model.load_weights(os.path.join(self._folder or "", WEIGHTS))

        self._runtime.on_root(read)
        self._runtime.broadcast(model)

    def close(self) -> None:
        """Removes what was fetched."""
        self._stack.close()


def open_newest(runtime: Runtime, store: CheckpointStore, step: int | None = None) -> Opened | None:
    """Opens a store's newest whole checkpoint; called by all ranks.

    Rank 0 reads it, once whatever the number of ranks, and broadcasts its training state.

    Args:
        runtime: The ranks.
        store: The store.
        step: This one instead of the newest.

    Returns:
        The checkpoint, or `None` where there is no whole one. To be closed.

    Raises:
        SettingError: On every rank: the store cannot be read, or there is no such step.
    """
    stack = contextlib.ExitStack()
    found: list[_Found] = []

    def read() -> _Told | None:
        passed_over: list[str] = []
        if step is not None:
            fetched = stack.enter_context(_one(store, step))
        else:
            newest = store.newest(lambda step, why: passed_over.append(f"{step}: {why}"))
            fetched = stack.enter_context(newest)
        if fetched is None:
            return None
        names = [file.name for file in fetched.checkpoint.manifest.files]
        packed = files.read(fetched.folder) if files.JSON in names else None
        found.append(_Found(fetched.folder, packed))
        return _Told(fetched.checkpoint, passed_over, packed and _outline(packed))

    told = runtime.on_root(read)
    if told is None:
        stack.close()
        return None
    own = found[0] if found else _Found(None, told.outline)
    state = None
    if own.packed is not None:
        names, arrays = list(own.packed.arrays), list(own.packed.arrays.values())
        arrays = weights.broadcast_arrays(runtime.communicator, arrays)
        packed = own.packed._replace(arrays=dict(zip(names, arrays, strict=True)))
        state = files.unpack(packed)
    return Opened(runtime, told.checkpoint, state, told.passed_over, own.folder, stack)


class _Found(NamedTuple):
    folder: str | None
    packed: files.Packed | None


class _Told(NamedTuple):
    checkpoint: Checkpoint
    passed_over: list[str]
    outline: files.Packed | None


def _outline(packed: files.Packed) -> files.Packed:
    """The same with arrays that take no memory, of its arrays' shapes and types."""
    arrays = packed.arrays.items()
    return packed._replace(
        arrays={name: np.broadcast_to(np.zeros((), a.dtype), a.shape) for name, a in arrays}
    )


@contextlib.contextmanager
def _one(store: CheckpointStore, step: int) -> Iterator[Fetched]:
    found = next((one for one in store.list() if one.step == step), None)
    if found is None:
        raise SettingError(f"{store.url} has no checkpoint of step {step}.")
    with store.fetch(found) as folder:
        yield Fetched(found, folder)


def at(url: str) -> tuple[str, int | None]:
    """A store's URL and a step, of the URL of a store or of one of its checkpoints."""
    parent, _, name = url.rstrip("/").rpartition("/")
    step = manifest.step_of(name)
    return (url, None) if step is None else (parent or os.curdir, step)


def roll_back(runtime: Runtime, store: CheckpointStore, model: keras.Model) -> Checkpoint | None:
    """Gives a model in training the newest whole checkpoint's weights; called by all ranks.

    And the optimizer's state, moving statistics and accumulated gradients of that time. The place
    in the data, generators and callbacks stay where they are. Rank 0 reads it, and broadcasts.

    Returns:
        The checkpoint, or `None` where there is no whole one: nothing is changed.

    Raises:
        SettingError: On every rank: the store cannot be read.
    """
    opened = open_newest(runtime, store)
    if opened is None:
        return None
    with contextlib.closing(opened):
        opened.load(model)
    if opened.state is not None:
        saved = opened.state["ranks"]
        own.roll_back(model, runtime.prepare(model), saved, runtime.rank, runtime.size)
    return opened.checkpoint


def restore(model: keras.Model, store: CheckpointStore | str) -> Checkpoint | None:
    """Gives all ranks the newest whole checkpoint's weights and optimizer state.

    Called by all ranks. Rank 0 reads it, once whatever their number, and broadcasts. A newer one
    that is not whole is passed over, and `events.jsonl` says why.

    Args:
        model: Built and compiled as it was when saved.
        store: Where `StoreCheckpoint` saved, or its URL.

    Returns:
        The checkpoint, or `None` if the store has no whole one; the model is then as before.

    Raises:
        SettingError: On every rank: the store cannot be read, and what to do.
        Exception: Rank 0's own on rank 0, for instance where the model is another than the saved;
            RankError on the others.
    """
    runtime = current()
    source = CheckpointStore(store) if isinstance(store, str) else store
    opened = open_newest(runtime, source)
    if opened is None:
        return None
    with contextlib.closing(opened):
        opened.load(model)
    checkpoint = opened.checkpoint
    runtime.events.emit(
        "restore",
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        rank=0,
        path=checkpoint.url,
        passed_over=opened.passed_over,
    )
    return checkpoint


def initialise(model: keras.Model, url: str) -> None:
    """Gives all ranks the weights, and nothing else, of a checkpoint or file; by all ranks.

    Args:
        model: Built. Its optimizer stays as it is.
        url: A `.weights.h5` or `.keras` file, a store (its newest whole checkpoint), or one of its
            checkpoints.

    Raises:
        SettingError: On every rank: there is none, or it is of another model.
    """
    runtime = current()

    def load(path: str) -> None:
        try:
            model.load_weights(path, objects_to_skip=weights.optimizers(model))
        except ValueError as error:
            raise SettingError(f"run.init_from={url} does not fit this model: {error}") from None

    def read() -> None:
        with contextlib.ExitStack() as stack:
            if url.endswith((".weights.h5", ".keras")):
                load(stack.enter_context(_weights_file(url)))
                return
            store, step = at(url)
            source = CheckpointStore(store)
            opening = source.newest() if step is None else _one(source, step)
            found = stack.enter_context(opening)
            if found is None:
                raise SettingError(f"run.init_from={url}: there is no whole checkpoint there.")
            load(os.path.join(found.folder, WEIGHTS))

    runtime.on_root(read)
    runtime.broadcast(model)


@contextlib.contextmanager
def _weights_file(url: str) -> Iterator[str]:
    """A local `.weights.h5`: the file itself, or what a `.keras` archive holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, url.rpartition("/")[2])
        fs, remote = storage.resolve(url)
        try:
            with storage.explained(url):
                fs.get_file(remote, path)
        except FileNotFoundError:
            raise SettingError(f"run.init_from={url}: there is no such file.") from None
        if path.endswith(".keras"):
            with zipfile.ZipFile(path) as archive:
                path = archive.extract(WEIGHTS, folder)
        yield path
