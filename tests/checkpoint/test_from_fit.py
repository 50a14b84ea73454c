"""`fit` with callbacks that save to real S3 and GCS servers, which fsspec's settings point at."""

from __future__ import annotations

import os

import keras
import numpy as np
import pytest

import orchestrator
from orchestrator import callbacks, storage
from orchestrator.checkpoint.best import recall
from orchestrator.checkpoint.retention import Last
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError
from tests.callbacks.models import Script, X, fit, make


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_model_checkpoint_keeps_the_best_of_two_runs(url, name, tmp_path):
    path = f"{url}/{name}"
    options = {"save_best_only": True, "save_weights_only": name.endswith(".h5")}
    for values, best in (([0.5, 0.3], 0.3), ([0.4], 0.3), ([0.2], 0.2)):
        model, callback = make(), callbacks.ModelCheckpoint(path, **options)
        fit(model, Script(values), callback, epochs=len(values))
        found = recall(path)
        assert found is not None
        assert (callback.best, found.value) == (best, best)
    fs, inner = storage.resolve(path)
    local = str(tmp_path / name)
    fs.get_file(inner, local)
    loaded = make()
    if name.endswith(".keras"):
        loaded = keras.models.load_model(local)
    else:
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(local)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    assert [os.path.basename(p) for p in fs.find(storage.resolve(url)[1])] == [name]


def test_store_checkpoint_and_restore(url):
    model = make()
    fit(model, callbacks.StoreCheckpoint(url, keep=[Last(2)]), epochs=4)
    assert [one.step for one in CheckpointStore(url).list()] == [9, 12]
    fresh = make()
    checkpoint = orchestrator.restore(fresh, url)
    assert checkpoint is not None
    assert checkpoint.step == 12
    ours = [*fresh.weights, *fresh.optimizer.variables]
    theirs = [*model.weights, *model.optimizer.variables]
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


@pytest.mark.parametrize("saver", [callbacks.ModelCheckpoint, callbacks.StoreCheckpoint])
def test_a_wrong_bucket_is_known_before_training(url, saver):
    protocol, _, rest = url.partition("://")
    wrong = f"{protocol}://no-such-bucket/{rest}.keras"
    model = make()
    with pytest.raises(SettingError, match=r"no-such-bucket.*There is no such bucket"):
        fit(model, saver(wrong))
    assert int(model.optimizer.iterations.numpy()) == 0
