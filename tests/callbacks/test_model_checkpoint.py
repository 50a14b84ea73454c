"""ModelCheckpoint in one process: when it saves, what it saves, and what a failure leaves."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import textwrap

import fsspec
import keras
import numpy as np
import pytest

from orchestrator import SettingError
from orchestrator.agreement import RankError
from orchestrator.callbacks import ModelCheckpoint
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.optimizer import distribute
from orchestrator.runtime import Runtime
from tests.callbacks.models import Script, X, Y, fit, make
from tests.fakes import FakeCommunicator, Recorder


def files(folder) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("monitor", "mode", "best_only"),
    [
        ("val_loss", "auto", False),
        ("val_loss", "min", False),
        ("val_accuracy", "max", False),
        ("val_accuracy", "auto", True),
    ],
)
def test_it_saves_making_folders(tmp_path, monitor, mode, best_only):
    path = tmp_path / "deep" / "model.keras"
    callback = ModelCheckpoint(str(path), monitor=monitor, mode=mode, save_best_only=best_only)
    model = make()
    fit(model, callback)
    assert files(path.parent) == ["model.keras"]
    loaded = keras.models.load_model(path)
    for mine, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert int(loaded.optimizer.iterations.numpy()) == 3


def test_a_path_object(tmp_path):
    fit(make(), ModelCheckpoint(tmp_path / "model.keras"))
    assert files(tmp_path) == ["model.keras"]


def test_templates(tmp_path):
    callback = ModelCheckpoint(str(tmp_path / "{epoch:02d}-{val_loss:.2f}.keras"))
    fit(make(), Script([0.256, 0.5, 1.004]), callback, epochs=3)
    assert files(tmp_path) == ["01-0.26.keras", "02-0.50.keras", "03-1.00.keras"]


def test_best_only_by_template(tmp_path):
    callback = ModelCheckpoint(str(tmp_path / "{epoch}.keras"), save_best_only=True)
    fit(make(), Script([3.0, 2.0, 2.0, 2.5, 1.0]), callback, epochs=5)
    assert files(tmp_path) == ["1.keras", "2.keras", "5.keras"]
    assert callback.best == 1.0


def test_nan_first_is_improved_on(tmp_path):
    callback = ModelCheckpoint(str(tmp_path / "{epoch}.keras"), save_best_only=True)
    fit(make(), Script([math.nan, 3.0, math.nan, 2.0]), callback, epochs=4)
    assert files(tmp_path) == ["2.keras", "4.keras"]


@pytest.mark.parametrize(
    ("monitor", "mode", "threshold", "saved"),
    [
        ("val_accuracy", "max", -0.01, True),
        ("val_loss", "auto", None, True),
        ("val_loss", "min", 0.0, False),
        ("val_loss", "auto", 0.0, False),
        ("val_accuracy", "auto", 1.0, False),
    ],
)
def test_initial_value_threshold(tmp_path, monitor, mode, threshold, saved):
    callback = ModelCheckpoint(
        str(tmp_path / "m.keras"),
        monitor=monitor,
        mode=mode,
        save_best_only=True,
        initial_value_threshold=threshold,
    )
    fit(make(), callback)
    assert files(tmp_path) == (["m.keras"] if saved else [])


def test_the_best_lives_on_in_the_next_fit(tmp_path):
    """Keras's ModelCheckpoint, unlike its EarlyStopping, keeps its best between fits."""
    callback = ModelCheckpoint(str(tmp_path / "{epoch}.keras"), save_best_only=True)
    fit(make(), Script([1.0]), callback)
    os.unlink(tmp_path / "1.keras")
    fit(make(), Script([2.0]), callback)
    assert files(tmp_path) == []


def test_weights_only(tmp_path):
    model, other = make(), make()
    fit(model, ModelCheckpoint(str(tmp_path / "m.weights.h5"), save_weights_only=True))
    other.optimizer.build(other.trainable_variables)
    assert files(tmp_path) == ["m.weights.h5"]
    other.load_weights(tmp_path / "m.weights.h5")
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [
        (6, 6, ["02-03", "04-03", "06-03"]),  # 3 batches an epoch: every second one
        (2, 3, ["01-02", "02-01", "02-03", "03-02"]),
        (1, 1, ["01-01", "01-02", "01-03"]),
        (100, 2, []),
    ],
)
def test_save_freq_in_batches(tmp_path, every, epochs, expected):
    callback = ModelCheckpoint(str(tmp_path / "{epoch:02d}-{batch:02d}.keras"), save_freq=every)
    fit(make(), callback, epochs=epochs)
    assert files(tmp_path) == [f"{name}.keras" for name in expected]


def test_save_freq_with_best_only(tmp_path):
    """The direction is inferred at the first save; Keras's own fails at the second."""
    path = str(tmp_path / "{epoch}-{batch}.keras")
    losses: dict[str, float] = {}
    witness = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.update({f"1-{batch + 1}.keras": logs["loss"]})
    )
    options = {"monitor": "loss", "save_best_only": True, "save_freq": 1}
    fit(make(), witness, ModelCheckpoint(path, **options), shuffle=False)
    values = list(losses.values())
    best = [name for i, name in enumerate(losses) if values[i] < min([*values[:i], np.inf])]
    assert files(tmp_path) == best
    assert 1 <= len(best) < len(losses)


def test_save_freq_on_two_ranks_is_of_global_metrics(tmp_path):
    """One allreduce a save; the other rank saw as many samples with no loss."""
    path = str(tmp_path / "{epoch}-{batch}-{loss:.6f}.keras")

    def reduce(flat):
        return flat + (flat * np.array([0, 1, 0, 1]) if flat.size == 4 else flat)

    communicator = FakeCommunicator(reduce=reduce)
    seen = []
    witness = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(logs["loss"])
    )
    with Runtime(communicator).use():
        model = make(run_eagerly=False)
        fit(model, witness, ModelCheckpoint(path, save_freq=2))
    assert files(tmp_path) == [f"1-2-{seen[1] / 2:.6f}.keras"]
    assert communicator.calls.count("allreduce") == 2  # the save, and the epoch's end


# Of Keras's own saving; pytest.warns gives it on without the module that pyproject.toml excepts.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_metric_that_is_not_there_saves_and_warns(tmp_path):
    path = str(tmp_path / "m.keras")
    callback = ModelCheckpoint(path, monitor="unknown", mode="min", save_best_only=True)
    with pytest.warns(UserWarning, match=r"only with unknown available.*val_loss"):
        fit(make(run_eagerly=False), callback)
    assert files(tmp_path) == ["m.keras"]


@pytest.mark.parametrize(
    "template",
    [
        *("{epoch}-{val_acc:.2f}.keras", "{0}.keras", "{epoch:.2q}.keras", "{epoch.keras"),
        *("{epoch.first}.keras", "{loss[0]}.keras", "{loss:d}.keras", "{}.keras"),
    ],
)
def test_a_template_that_cannot_be_filled(tmp_path, template):
    with pytest.raises(SettingError) as caught:
        fit(make(), ModelCheckpoint(str(tmp_path / template)))
    message = str(caught.value)
    assert template in message
    assert "accuracy, epoch, loss, val_accuracy, val_loss" in message
    assert files(tmp_path) == []


def test_a_metric_of_the_name_epoch(tmp_path):
    model = make(metrics=[keras.metrics.MeanSquaredError(name="epoch")])
    fit(model, ModelCheckpoint(str(tmp_path / "{epoch}.keras")))
    assert files(tmp_path) == ["1.keras"]


def test_a_batch_in_an_epochs_template(tmp_path):
    with pytest.raises(SettingError, match="'batch'"):
        fit(make(), ModelCheckpoint(str(tmp_path / "{batch}.keras")))
    assert files(tmp_path) == []


def test_a_direction_that_cannot_be_inferred(tmp_path):
    callback = ModelCheckpoint(str(tmp_path / "m.keras"), monitor="val_acc", save_best_only=True)
    with pytest.raises(SettingError, match="mode='max'"):
        fit(make(), callback)
    assert files(tmp_path) == []


def test_memory():
    fs = fsspec.filesystem("memory")
    try:
        model = make()
        fit(model, ModelCheckpoint("memory://bucket/run/{epoch:02d}.keras"), epochs=2)
        assert sorted(fs.ls("/bucket/run", detail=False)) == [
            "/bucket/run/01.keras",
            "/bucket/run/02.keras",
        ]
        assert fs.cat_file("/bucket/run/02.keras")[:2] == b"PK"
    finally:
        fs.rm("/bucket", recursive=True)


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "m.keras").mkdir()
    with pytest.raises(IsADirectoryError, match=r"m\.keras is a folder"):
        fit(make(), ModelCheckpoint(str(tmp_path / "m.keras")))
    assert files(tmp_path) == ["m.keras"]
    assert files(tmp_path / "m.keras") == []


@pytest.mark.parametrize("when", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, when):
    path = tmp_path / "m.keras"
    callback = ModelCheckpoint(str(path))
    model = make()
    fit(model, callback)
    old = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(target, **options):
        with open(target, "wb") as file:
            file.write(old[: len(old) // 2])
        full()

    if when == "write":
        monkeypatch.setattr(model, "save", half)
    else:
        monkeypatch.setattr(os, {"fsync": "fsync", "rename": "replace"}[when], full)
    with pytest.raises(OSError, match="No space left"):
        fit(model, callback)
    assert path.read_bytes() == old
    assert files(tmp_path) == ["m.keras"]


def test_events_and_words(tmp_path, capsys):
    runtime, recorder = Runtime(SingleCommunicator()), Recorder()
    runtime.events = recorder
    path = str(tmp_path / "m.keras")
    with runtime.use():
        callback = ModelCheckpoint(path, save_best_only=True, verbose=1)
        fit(make(), Script([2.0, 3.0]), callback, epochs=2)
    (event,) = recorder.events
    assert event == {
        "kind": "checkpoint",
        "epoch": 0,
        "step": 3,
        "rank": 0,
        "path": path,
        "monitor": "val_loss",
        "value": 2.0,
    }
    assert capsys.readouterr().out.split("\n") == [
        "",
        f"Epoch 1: val_loss improved from None to 2.00000, saving model to {path}",
        "",
        f"Epoch 1: finished saving model to {path}",
        "",
        "Epoch 2: val_loss did not improve from 2.00000",
        "",
    ]


def test_only_the_root_writes_and_all_learn(tmp_path):
    communicator = FakeCommunicator(1, 2, broadcast=lambda told: told)
    with Runtime(communicator).use():
        fit(make(run_eagerly=False), ModelCheckpoint(str(tmp_path / "m.keras")), epochs=2)
    assert files(tmp_path) == []
    assert communicator.calls.count("broadcast_object") == 1 + 2, "trying it out, and two saves"


def test_a_failure_of_the_root_is_raised_on_the_others(tmp_path):
    communicator = FakeCommunicator(1, 2, broadcast=lambda told: (None, (False, "disk full")))
    with (
        Runtime(communicator).use(),
        pytest.raises(RankError, match="Rank 0 failed: disk full"),
    ):
        fit(make(run_eagerly=False), ModelCheckpoint(str(tmp_path / "m.keras")))


def test_the_file_goes_on_where_only_keras_is(tmp_path):
    """Trained distributed, loaded where neither this package nor Horovod can be imported."""
    communicator = FakeCommunicator()
    path = tmp_path / "m.keras"
    with Runtime(communicator).use():
        optimizer = distribute(keras.optimizers.Adam(0.1), communicator)
        model = make(optimizer=optimizer, run_eagerly=False)
        fit(model, ModelCheckpoint(str(path), save_best_only=True))
    np.savez(tmp_path / "data.npz", x=X, y=Y, predictions=model.predict(X, verbose=0))
    script = textwrap.dedent(
        """
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("orchestrator", "horovod", "mpi4py"):
                    raise ImportError(f"{name} is not installed here")

        sys.meta_path.insert(0, Refuse())
        import keras, numpy as np

        model = keras.models.load_model(sys.argv[1])
        data = np.load(sys.argv[2])
        assert type(model.optimizer) is keras.optimizers.Adam, type(model.optimizer)
        assert int(model.optimizer.iterations.numpy()) == 3
        predictions = model.predict(data["x"], verbose=0)
        np.testing.assert_allclose(predictions, data["predictions"], rtol=1e-6)
        first = model.evaluate(data["x"], data["y"], verbose=0)[0]
        model.fit(data["x"], data["y"], epochs=5, verbose=0)
        assert int(model.optimizer.iterations.numpy()) == 8
        assert model.evaluate(data["x"], data["y"], verbose=0)[0] < first
        assert not {"orchestrator", "horovod", "mpi4py"} & set(sys.modules)
        print("went on")
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "data.npz")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("went on")
