"""`train(settings)`: the only file that knows all parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from orchestrator import callbacks as ours
from orchestrator import handshake, restoring, storage, weights
from orchestrator import runtime as runtimes
from orchestrator.config import SettingError, Settings
from orchestrator.events import RunDirectory
from orchestrator.parts import Parts, call
from orchestrator.preemption import EXIT_CODE, Preempted
from orchestrator.restoring import Opened
from orchestrator.run_directory import (
    open_checkpoint,
    open_directory,
    record_failure,
    recorded_refusal,
)
from orchestrator.runtime import Runtime


def train(settings: Settings, runtime: Runtime | None = None) -> keras.callbacks.History:
    """Trains as the settings say; called by all ranks.

    Args:
        settings: As `config.load` gives them.
        runtime: Already made by `init`; by default `init` is called from `settings.run`.

    Returns:
        Keras's `History`, its `model` trained and the same on every rank.

    Raises:
        SettingError: On every rank, before training where it can be known by then.
        Preempted: On every rank: a notice came, and a checkpoint was committed.
    """
    runtime = runtime or start(settings)
    with recorded_refusal(settings, runtime):
        parts, opened = _open(settings, runtime)
    # Whatever was drawn until here (user code on import, a library's waits) does not count.
    runtime.reseed()
    with contextlib.closing(opened) if opened else contextlib.nullcontext():
        directory = open_directory(settings, runtime)
        try:
            return _train(settings, runtime, parts, directory, opened)
        except Preempted as preempted:
            if directory is not None:
                directory.outcome(EXIT_CODE, str(preempted), preempted.epoch, preempted.step)
            raise
        except Exception as error:
            record_failure(runtime, directory, error)
            raise


def _open(settings: Settings, runtime: Runtime) -> tuple[Parts, Opened | None]:
    """What the settings name, alike on all ranks, and what is gone on from; by all ranks."""
    handshake.agree(runtime.communicator, handshake.of_programs(settings))
    check_batch(settings.train.global_batch_size, runtime)
    parts = runtime.on_all(lambda: Parts.of(settings))
    code = runtime.on_all(lambda: handshake.of_code(parts.data, parts.model))
    handshake.agree(runtime.communicator, code)
    return parts, open_checkpoint(settings, runtime)


def _train(
    settings: Settings,
    runtime: Runtime,
    parts: Parts,
    directory: RunDirectory | None,
    opened: Opened | None,
) -> keras.callbacks.History:
    """Assembles and fits; called by all ranks, `directory` on rank 0 alone."""
    training, validation = runtime.on_all(lambda: _load(settings, runtime, parts.data))
    train_part, validation_part = _shards(settings, runtime, training, validation)
    with runtime.scope():
        model = runtime.on_all(lambda: _build(settings, parts.model))
        runtime.distribute(model.optimizer)
    if settings.run.init_from is not None and opened is None:
        restoring.initialise(model, settings.run.init_from)
    made = [make() for make in parts.callbacks]
    facts = handshake.of_training(model, made, train_part)
    handshake.agree(runtime.communicator, facts)
    runtime.broadcast(model)
    runtime.say(_greeting(settings, runtime))
    runtime.events.emit(
        "start",
        epoch=None,
        step=0,
        rank=0,
        backend=runtime.backend,
        ranks=runtime.size,
        replicas=runtime.replicas,
        seed=runtime.seed,
    )
    checkpoint = parts.checkpoint(resume=opened or False)
    if not any(isinstance(callback, ours.Stragglers) for callback in made):
        made.append(ours.Stragglers())
    try:
        history = model.fit(
            train_part,
            validation_data=validation_part,
            epochs=settings.train.epochs,
            shuffle=False,  # datasets: shuffled already
            verbose=2 if runtime.is_root else 0,
            callbacks=[
                *made,
                ours.CSVLogger(storage.join(settings.run.dir, "history.csv")),
                checkpoint,
            ],
        )
    finally:
        checkpoint.close()
    stopper = next((c for c in made if isinstance(c, ours.EarlyStopping)), None)
    restored = stopper.restored_epoch if stopper else None
    _finish(settings, runtime, history, directory, restored)
    return history


def start(settings: Settings) -> Runtime:
    """Calls `init` with what the settings say."""
    return runtimes.init(
        settings.run.backend,
        seed=settings.run.seed,
        replicas=settings.run.replicas,
        deterministic=settings.run.deterministic,
        gradient_buckets=settings.train.gradient_buckets,
        gradient_compression=settings.train.gradient_compression,
        timeout=settings.run.timeout,
    )


def check_batch(size: int, runtime: Runtime) -> None:
    """Raises `SettingError` unless each rank or replica gets as many samples of a full batch."""
    parts = runtime.replicas
    if size % parts:
        below, above = size // parts * parts, -(-size // parts) * parts
        allowed = f"{below} or {above}" if below else f"{above}"
        raise SettingError(
            f"train.global_batch_size={size} is not divisible by the {parts} ranks or replicas. "
            f"Nearest that are: {allowed}."
        )


def _load(settings: Settings, runtime: Runtime, load_data: Callable[..., Any]) -> tuple[Any, Any]:
    """The user's training and validation data, the latter perhaps `None`."""
    given = {"global_batch_size": settings.train.global_batch_size, "seed": runtime.seed}
    loaded = call("data", settings.data, load_data, **given)
    if not isinstance(loaded, tuple) or len(loaded) != 2:
        raise SettingError(
            f"data.factory={settings.data.factory} must return (training, validation), "
            f"validation perhaps None; got {type(loaded).__name__}."
        )
    return loaded


def _shards(settings: Settings, runtime: Runtime, training: Any, validation: Any):
    """This rank's parts of both; called by all ranks."""
    try:
        return (
            runtime.shard(training, **_order(settings, training, shuffle=True)),
            None
            if validation is None
            else runtime.shard(validation, **_order(settings, validation)),
        )
    except ValueError as error:
        raise SettingError(f"data.factory={settings.data.factory}: {error}") from None


def _order(settings: Settings, loaded: Any, shuffle: bool = False) -> dict[str, Any]:
    """How `shard` is to batch what is not batched yet; training data is shuffled, as by `fit`."""
    if isinstance(loaded, (tf.data.Dataset, keras.utils.PyDataset, Iterator)):
        return {}
    return {"batch_size": settings.train.global_batch_size, "shuffle": shuffle}


def _build(settings: Settings, build_model: Callable[..., Any]) -> keras.Model:
    """The user's compiled model."""
    model = call("model", settings.model, build_model)
    if not isinstance(model, keras.Model) or getattr(model, "optimizer", None) is None:
        raise SettingError(
            f"model.factory={settings.model.factory} must return a compiled keras.Model, got "
            f"{model!r}. Call model.compile(optimizer=..., loss=...) in it."
        )
    return model


def _greeting(settings: Settings, runtime: Runtime) -> str:
    size = settings.train.global_batch_size
    who = {
        "single": "one process",
        "mirrored": f"{runtime.replicas} replicas under MirroredStrategy",
    }.get(runtime.backend, f"{runtime.size} ranks under {runtime.backend}")
    return (
        f"Training on {who}: {size} samples a step, {size // runtime.replicas} on each; "
        f"at most {settings.train.epochs} epochs; seed {runtime.seed}; results in "
        f"{settings.run.dir}"
    )


def _finish(
    settings: Settings,
    runtime: Runtime,
    history: Any,
    directory: RunDirectory | None,
    restored: int | None,
) -> None:
    """Checks that the ranks agree on the end, records it, and says it in plain words."""
    model = history.model
    digests = runtime.communicator.allgather_object(weights.weights_digest(model))
    if len(set(digests)) > 1:
        raise RuntimeError(f"The ranks end with different weights; digests by rank: {digests}.")
    step, epoch = int(model.optimizer.iterations.numpy()), history.epoch[-1]
    runtime.events.emit(
        "end", epoch=epoch, step=step, rank=0, weights=digests[0], ranks_alike=len(digests)
    )
    if directory is not None:
        directory.outcome(0, "finished", epoch, step)
    kept = epoch if restored is None else restored
    values = {k: v[kept] for k, v in history.history.items() if k.startswith("val_")}
    shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
    runtime.say(
        f"Done after {epoch + 1} epochs, {step} steps; the weights are those of epoch {kept + 1}"
        f"{f' ({shown})' if shown else ''}, alike on all {runtime.size} rank(s) "
        f"(digest {digests[0]}).\nResults: history.csv, events.jsonl, config.yaml and what the "
        f"callbacks saved, in {settings.run.dir}"
    )
