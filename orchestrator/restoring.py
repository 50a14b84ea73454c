"""`restore`: a checkpoint read once, for all ranks."""

from __future__ import annotations

import os

import keras

from orchestrator import weights
from orchestrator.checkpoint.catalog import Checkpoint
from orchestrator.checkpoint.layout import WEIGHTS
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.runtime import current


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
    passed_over: list[str] = []

    def load() -> Checkpoint | None:
        weights.state_variables(model)  # builds the optimizer, whose state is there as well
        with source.newest(lambda step, why: passed_over.append(f"{step}: {why}")) as found:
            if found is None:
                return None
            model.load_weights(os.path.join(found.folder, WEIGHTS))
            return found.checkpoint

    checkpoint = runtime.on_root(load)
    if checkpoint is not None:
        runtime.broadcast(model)
        runtime.events.emit(
            "restore",
            epoch=checkpoint.epoch,
            step=checkpoint.step,
            rank=0,
            path=checkpoint.url,
            passed_over=passed_over,
        )
    return checkpoint
