"""The callbacks decide as one, restore rank 0's best weights, and write from rank 0 alone."""

from __future__ import annotations

import os
import sys

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.agreement import RankError
from orchestrator.config import SettingError
from tests.distributed import problems
from tests.distributed.rank_plugin import once, three


def fit_line(runtime, targets, ours, epochs, rate=0.05):
    """Trains w from 0 towards 1, one step an epoch; `targets` are the validation's."""
    model = problems.line()
    model.compile(runtime.distribute(keras.optimizers.SGD(rate)), "mse")
    runtime.broadcast(model)
    history = model.fit(
        runtime.shard(problems.points(np.ones(12)), batch_size=12),
        validation_data=runtime.shard(problems.points(targets), batch_size=len(targets)),
        epochs=epochs,
        verbose=0,
        callbacks=ours,
    )
    return model, history


def local_stop(epochs, target, patience):
    """Where Keras's own EarlyStopping would stop on one rank's own validation loss."""
    model = problems.line()
    stopper = keras.callbacks.EarlyStopping("val_loss", patience=patience, mode="min")
    stopper.set_model(model)
    stopper.on_train_begin()
    model.stop_training = False
    for epoch, ((weight,),) in enumerate(w[0] for w in epochs):
        stopper.on_epoch_end(epoch, {"val_loss": float((weight - target) ** 2)})
        if model.stop_training:
            return epoch
    return None


def test_disagreeing_shards_stop_together(runtime, communicator):
    # Rank r's part of the validation is at its best once w passes its own target.
    targets = np.linspace(0.25, 0.6, runtime.size) if runtime.size > 1 else np.array([0.4])
    recorder = problems.Weights()
    stopper = callbacks.EarlyStopping(patience=3)
    _, history = fit_line(runtime, targets, [recorder, stopper], epochs=20)
    stops = communicator.allgather_object((len(history.epoch), stopper.stopped_epoch))
    assert len(set(stops)) == 1
    assert 3 < stopper.stopped_epoch == len(history.epoch) - 1 < 19

    # More epochs without a stop, to see where each rank alone would have stopped.
    recorder = problems.Weights()
    fit_line(runtime, targets, [callbacks.GlobalMetrics(), recorder], epochs=16)
    alone = communicator.allgather_object(local_stop(recorder.epochs, targets[runtime.rank], 3))
    assert None not in alone
    assert len(set(alone)) == runtime.size
    assert min(alone) <= stopper.stopped_epoch <= max(alone)


class Counting(keras.layers.Layer):
    """Counts dark pixels in a weight: each rank its own, which nothing brings together."""

    def build(self, shape):
        self.dark = self.add_weight((), "zeros", dtype="int32", trainable=False)

    def call(self, x, training=False):
        if training:
            self.dark.assign_add(keras.ops.sum(keras.ops.cast(x < 0.5, "int32")))
        return x


def noisy_model(runtime, *first):
    """With moving statistics and dropout."""
    model = keras.Sequential(
        [
            keras.Input((64,)),
            *first,
            keras.layers.Dense(16, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    model.compile(
        runtime.distribute(keras.optimizers.SGD(0.1)),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    runtime.broadcast(model)
    return model


def fit_digits(runtime, ours, epochs, *first):
    model = noisy_model(runtime, *first)
    model.fit(
        runtime.shard(problems.digits(256), batch_size=64),
        validation_data=runtime.shard(problems.digits(101, 300), batch_size=64),
        epochs=epochs,
        verbose=0,
        callbacks=ours,
    )
    return model


def check_restored(communicator, model, recorder, best_epoch):
    root = communicator.broadcast_object(problems.bits(recorder.epochs[best_epoch]))
    ours = communicator.allgather_object(problems.bits(model.get_weights()))
    assert all(weights == root for weights in ours)


@pytest.mark.parametrize(
    "how",
    [
        "stops",
        *(pytest.param(h, marks=once) for h in ("another stops", "last is best", "runs out")),
    ],
)
def test_best_weights_are_restored_everywhere(runtime, communicator, how):
    # Accuracy watched with "min" makes an early epoch the best; the loss always falls.
    recorder = problems.Weights()
    monitor = "loss" if how == "last is best" else "val_accuracy"
    patience = {"stops": 2, "runs out": 50}.get(how, 50)
    stopper = callbacks.EarlyStopping(
        monitor, patience=patience, mode="min", restore_best_weights=True
    )
    others = [problems.StopAfter(4)] if how == "another stops" else []
    model = fit_digits(runtime, [stopper, recorder, *others], 7, Counting())
    seen = communicator.allgather_object((len(recorder.epochs), stopper.best_epoch))
    assert len(set(seen)) == 1
    epochs, best = seen[0]
    assert epochs == {"stops": best + 3, "another stops": 5}.get(how, 7)
    assert (best == epochs - 1) == (how == "last is best")
    assert stopper.restored_epoch == best
    assert (stopper.best_weights is not None) == runtime.is_root
    if runtime.size > 1:  # each rank's own count had drifted apart
        last = communicator.allgather_object(problems.bits(recorder.epochs[best]))
        assert len({tuple(weights) for weights in last}) == runtime.size
    check_restored(communicator, model, recorder, best)


_watched: list[str] = []
_writes: list[str] = []
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _audit(event, arguments):
    if not _watched or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        return
    paths = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes))]
    if not any(path.startswith(_watched[0]) for path in paths):
        return
    if event != "open" or (isinstance(arguments[2], int) and arguments[2] & _WRITING):
        _writes.append(f"{event} {paths}")


_audited: list[bool] = []


@pytest.fixture
def writes(shared_path, communicator):
    """What this rank writes under `shared_path`, seen by the interpreter's own audit events."""
    if not _audited:
        # A hook stays for good: one a process.
        sys.addaudithook(_audit)
        _audited.append(True)
    _writes.clear()
    _watched[:] = [str(shared_path)]
    yield _writes
    _watched.clear()


@pytest.mark.parametrize(("suffix", "freq"), [(".keras", "epoch"), (".weights.h5", 3)])
def test_only_rank_0_writes(runtime, communicator, shared_path, writes, suffix, freq):
    path = shared_path / "deep" / f"{{epoch:02d}}-{{loss:.3f}}{suffix}"
    saver = callbacks.ModelCheckpoint(
        str(path), save_weights_only=suffix != ".keras", save_freq=freq
    )
    logger = callbacks.CSVLogger(str(shared_path / "history.csv"))
    recorder = problems.Weights()
    fit_digits(runtime, [saver, logger, recorder], epochs=3)
    counts = communicator.allgather_object(len(writes))
    assert counts[0] > 0
    assert counts[1:] == [0] * (runtime.size - 1)
    files = sorted(file.name for file in (shared_path / "deep").iterdir())
    assert len(files) == {"epoch": 3, 3: 4}[freq]
    assert all(file.endswith(suffix) and not file.startswith(".") for file in files)
    if freq == "epoch":
        saved = noisy_model(runtime)
        saved.load_weights(shared_path / "deep" / files[-1])
        root = communicator.broadcast_object(problems.bits(recorder.epochs[-1]))
        assert problems.bits(saved.get_weights()) == root


@three
def test_the_saved_model_loads_on_every_rank_without_us(runtime, communicator, shared_path):
    path = shared_path / "best.keras"
    saver = callbacks.ModelCheckpoint(str(path), monitor="val_loss", save_best_only=True)
    recorder = problems.Weights()
    model = fit_digits(runtime, [saver, recorder], epochs=2)
    loaded = keras.models.load_model(path)
    assert type(loaded.optimizer) is keras.optimizers.SGD
    assert "apply" not in vars(loaded.optimizer)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    x, y = problems.digits(8)
    assert np.isfinite(loaded.fit(x, y, verbose=0).history["loss"]).all()


@three
def test_a_failed_save_is_raised_everywhere(runtime, communicator, shared_path):
    target = shared_path / "model.keras"
    if runtime.is_root:
        target.mkdir()
    communicator.barrier()
    saver = callbacks.ModelCheckpoint(str(target))
    with pytest.raises(IsADirectoryError if runtime.is_root else RankError, match=r"model\.keras"):
        fit_digits(runtime, [saver], epochs=2)
    assert [path.name for path in shared_path.rglob("*")] == ["model.keras"]


@three
def test_a_target_that_cannot_be_written_is_known_before_training(
    runtime, communicator, shared_path
):
    if runtime.is_root:
        (shared_path / "file").touch()
    communicator.barrier()
    saver = callbacks.ModelCheckpoint(str(shared_path / "file" / "{epoch}.keras"))
    recorder = problems.Weights()
    with pytest.raises(SettingError, match="A file is in the way of a folder"):
        fit_digits(runtime, [recorder, saver], epochs=2)
    assert recorder.epochs == []
    assert [path.name for path in shared_path.rglob("*")] == ["file"]


@three
def test_a_template_with_an_unknown_metric_is_a_setting_error_everywhere(
    runtime, communicator, shared_path
):
    saver = callbacks.ModelCheckpoint(str(shared_path / "{epoch}-{val_auc:.2f}.keras"))
    with pytest.raises(SettingError, match=r"val_auc.*val_loss") as caught:
        fit_digits(runtime, [saver], epochs=2)
    assert len(set(communicator.allgather_object(str(caught.value)))) == 1
    assert list(shared_path.iterdir()) == []
