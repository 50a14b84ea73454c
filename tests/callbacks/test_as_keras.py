"""Beside Keras's own classes in one process: what they do with the same values, and refuse."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

from orchestrator import SettingError, callbacks
from tests.callbacks import deciding
from tests.callbacks.models import fit, make


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize("case", deciding.CASES, ids=deciding.IDS)
def test_decisions(case, model, tmp_path):
    seen = []
    for module in (keras.callbacks, callbacks):
        folder = tmp_path / module.__name__
        folder.mkdir()
        watched = deciding.Watched(case.make(module, folder), folder)
        seen.append(deciding.drive(watched, model, deciding.VALUES))
    for epoch, (theirs, ours) in enumerate(zip(*seen, strict=True)):
        assert ours == theirs, f"epoch {epoch}"


class Up(keras.metrics.Mean):
    """A user's own metric that says that more is better."""

    def __init__(self, name="mine"):
        super().__init__(name)
        self._direction = "up"

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_pred)


@pytest.mark.parametrize(
    ("metric", "monitor"),
    [
        (Up, "val_mine"),
        (lambda: keras.metrics.F1Score(name="f1"), "val_f1"),  # an array of one element
        (lambda: keras.metrics.F1Score(name="f1", average="macro"), "f1"),
    ],
)
def test_metrics_with_a_direction(metric, monitor):
    seen = []
    for module in (keras.callbacks, callbacks):
        stop = module.EarlyStopping(monitor, patience=2)
        plateau = module.ReduceLROnPlateau(monitor, patience=1)
        history = fit(make(metrics=[metric()]), stop, plateau, epochs=5)
        assert stop.monitor_op is plateau.monitor_op is keras.ops.greater
        seen.append((history.epoch, stop.best, plateau.wait, history.history["learning_rate"]))
    assert seen[0] == seen[1]


def one_an_output(y_true, y_pred):
    return keras.ops.abs(y_true - y_pred)


@pytest.mark.parametrize("kind", [callbacks.EarlyStopping, callbacks.ReduceLROnPlateau])
def test_a_metric_of_several_numbers(kind):
    callback = kind("val_several", mode="max")
    callback.set_model(make())
    callback.on_train_begin()
    with pytest.raises(SettingError, match=r"val_several.*2 numbers.*average"):
        callback.on_epoch_end(0, {"val_several": np.array([0.5, 0.25])})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_checkpoint_by_a_metric_that_is_no_scalar_is_saved_each_time(tmp_path):
    for module in (keras.callbacks, callbacks):
        folder = tmp_path / module.__name__
        saver = module.ModelCheckpoint(
            str(folder / "{epoch}.keras"), "val_f1", save_best_only=True, mode="max"
        )
        with pytest.warns(UserWarning, match="Can save best model only"):
            fit(make(metrics=[keras.metrics.F1Score(name="f1")]), saver, epochs=3)
        assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a b/ü[1]*?#%20.keras", "a b/ü[1]*?#%20.keras"),
        ("{epoch:.2f}-{loss!s:.3}.keras", "1.00-0.2.keras"),
        ("{{epoch}}{epoch}.keras", "{epoch}1.keras"),
        ("x::y.keras", "x::y.keras"),
        ("~x/{epoch}.h5", "~x/1.h5"),
    ],
)
def test_odd_file_names(tmp_path, name, found):
    for module in (keras.callbacks, callbacks):
        folder = tmp_path / module.__name__
        fit(make(), module.ModelCheckpoint(str(folder / name)))
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        assert files == [found]


REFUSED = [
    ("BackupAndRestore", {"backup_dir": "x", "save_freq": "batch"}),
    ("BackupAndRestore", {"backup_dir": "x", "save_freq": 0.15}),
    ("BackupAndRestore", {"backup_dir": ""}),
    ("BackupAndRestore", {"backup_dir": None}),
    ("ModelCheckpoint", {"filepath": "x.keras", "save_freq": "often"}),
    ("ModelCheckpoint", {"filepath": "x.keras", "save_freq": 1.5}),
    ("ModelCheckpoint", {"filepath": "x.txt"}),
    ("ModelCheckpoint", {"filepath": "x.keras", "save_weights_only": True}),
    ("ReduceLROnPlateau", {"factor": 1.0}),
    ("TensorBoard", {"update_freq": 1, "profile_batch": "a"}),
    ("TensorBoard", {"profile_batch": (3, 2)}),
]


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_what_keras_refuses_is_refused_with_its_words(name, options):
    with pytest.raises(ValueError, match=r"\w+") as theirs:
        getattr(keras.callbacks, name)(**options)
    with pytest.raises(ValueError, match=f"^{re.escape(str(theirs.value))}$"):
        getattr(callbacks, name)(**options)
