"""ModelCheckpoint with `save_best_only`: what a file says of itself to a later run."""

from __future__ import annotations

import fsspec
import keras
import pytest

from orchestrator.callbacks import ModelCheckpoint
from orchestrator.checkpoint.best import recall
from tests.callbacks.models import Script, X, fit, make


def value_of(path):
    found = recall(str(path))
    assert found is not None
    return found.value


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_worse_model_of_a_later_run_replaces_no_better_one(tmp_path, name, place):
    folder = str(tmp_path) if place == "disk" else "memory://best"
    path = f"{folder}/{name}"
    options = {"save_best_only": True, "save_weights_only": name.endswith(".h5")}

    def run(*values):
        model, callback = make(), ModelCheckpoint(path, **options)
        fit(model, Script(list(values)), callback, epochs=len(values))
        return model, callback.best

    model, best = run(0.5, 0.3)
    fs, inner = fsspec.core.url_to_fs(path)
    assert (best, value_of(path)) == (0.3, 0.3)
    saved = fs.cat_file(inner)
    _, best = run(0.4, 0.35)
    assert best == 0.3
    assert fs.cat_file(inner) == saved
    _, best = run(0.4, 0.2, 0.25)
    assert (best, value_of(path)) == (0.2, 0.2)
    local = str(tmp_path / f"copy-{name}")
    fs.get_file(inner, local)
    if name.endswith(".keras"):
        keras.models.load_model(local).predict(X, verbose=0)
    else:
        model.load_weights(local)
    if place == "memory":
        fs.rm("/best", recursive=True)


def test_the_best_by_another_metric_is_replaced(tmp_path):
    path = tmp_path / "best.keras"
    for monitor, mode in (("val_loss", "min"), ("val_accuracy", "max"), ("val_accuracy", "min")):
        callback = ModelCheckpoint(path, monitor=monitor, mode=mode, save_best_only=True)
        fit(make(), callback)
        found = recall(str(path))
        assert found is not None
        assert (found.monitor, found.mode) == (monitor, mode)


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_a_file_that_says_nothing_is_replaced(tmp_path, name):
    path = tmp_path / name
    for content in (b"", b"neither a zip nor HDF5"):
        path.write_bytes(content)
        assert recall(str(path)) is None
    fit(make(), ModelCheckpoint(path, save_best_only=True, save_weights_only="weights" in name))
    assert recall(str(path)) is not None
    plain = tmp_path / f"plain-{name}"
    fit(make(), ModelCheckpoint(plain, save_weights_only="weights" in name))
    assert recall(str(plain)) is None
