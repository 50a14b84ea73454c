"""CSVLogger in one process."""

from __future__ import annotations

import csv
import io
import os
from typing import Any, cast

import fsspec
import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.agreement import RankError
from orchestrator.callbacks import CSVLogger, ReduceLROnPlateau
from orchestrator.runtime import Runtime
from tests.callbacks.models import Script, fit, make
from tests.fakes import FakeCommunicator

NAMES = ["accuracy", "loss", "val_accuracy", "val_loss"]


def read(path, delimiter: str = ",") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def test_columns_and_values(tmp_path):
    path = tmp_path / "log.csv"
    history = fit(make(), CSVLogger(str(path)), epochs=3)
    rows = read(path)
    assert list(rows[0]) == ["epoch", *NAMES, "learning_rate"]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    for name in NAMES:
        assert [float(row[name]) for row in rows] == history.history[name]
    assert float(rows[0]["learning_rate"]) == np.float32(0.1)


def test_the_shared_columns_are_those_of_keras(tmp_path):
    fit(make(), keras.callbacks.CSVLogger(str(tmp_path / "a.csv")), epochs=2)
    fit(make(), CSVLogger(str(tmp_path / "b.csv")), epochs=2)
    theirs, ours = read(tmp_path / "a.csv"), read(tmp_path / "b.csv")
    assert [{k: row[k] for k in theirs[0]} for row in ours] == theirs
    assert b"\r" not in (tmp_path / "b.csv").read_bytes()


def test_separator_and_folders(tmp_path):
    path = tmp_path / "deep" / "log.tsv"
    fit(make(), CSVLogger(str(path), separator="\t"))
    (row,) = read(path, "\t")
    assert set(NAMES) < set(row)


def test_append(tmp_path):
    path = tmp_path / "log.csv"
    fit(make(), CSVLogger(str(path)), epochs=2)
    before = path.read_text()
    logger = CSVLogger(str(path), append=True)
    fit(make(), logger)
    fit(make(), logger, epochs=2)  # used again
    text = path.read_text()
    assert text.startswith(before)
    assert text.count("epoch") == 1
    assert [row["epoch"] for row in read(path)] == ["0", "1", "0", "0", "1"]


def test_append_to_nothing_has_a_header(tmp_path):
    path = tmp_path / "log.csv"
    fit(make(), CSVLogger(str(path), append=True))
    assert len(read(path)) == 1


def test_without_append_the_file_is_new(tmp_path):
    path = tmp_path / "log.csv"
    for _ in range(2):
        fit(make(), CSVLogger(str(path)), epochs=2)
    assert len(read(path)) == 2


def test_validation_every_third_epoch_has_its_columns(tmp_path):
    path = tmp_path / "log.csv"
    history = fit(make(), CSVLogger(str(path)), epochs=5, validation_freq=3)
    values = [row["val_loss"] for row in read(path)]
    assert values == ["NA", "NA", str(history.history["val_loss"][0]), "NA", "NA"]


def test_a_cut_shows_in_the_next_line(tmp_path):
    path = tmp_path / "log.csv"
    plateau = ReduceLROnPlateau(patience=1)
    fit(make(), Script([1.0, 2.0, 0.5]), plateau, CSVLogger(str(path)), epochs=3)
    rates = [float(row["learning_rate"]) for row in read(path)]
    assert rates == pytest.approx([0.1, 0.1, 0.01])
    assert list(read(path)[0]).count("learning_rate") == 1


def test_nan_and_arrays(tmp_path):
    path = tmp_path / "log.csv"
    metrics = [keras.metrics.F1Score(name="f1", threshold=0.5)]
    fit(make(metrics=metrics), Script([float("nan")]), CSVLogger(str(path)))
    (row,) = read(path)
    assert row["val_loss"] == "nan"
    assert row["f1"].startswith('"[')


def test_a_training_that_ends_in_nan_is_logged(tmp_path):
    path = tmp_path / "log.csv"
    model = make(loss="mse")
    model.layers[0].kernel.assign(np.full((3, 1), np.nan, "float32"))
    fit(model, keras.callbacks.TerminateOnNaN(), CSVLogger(str(path)), epochs=4)
    rows = read(path)
    assert len(rows) == 1
    assert rows[0]["loss"] == "nan"


def test_anywhere():
    fs = fsspec.filesystem("memory")
    try:
        fit(make(), CSVLogger("memory://logs/log.csv"), epochs=2)
        text = fs.cat_file("/logs/log.csv").decode()
        assert [row["epoch"] for row in csv.DictReader(io.StringIO(text))] == ["0", "1"]
    finally:
        fs.rm("/logs", recursive=True)


def test_only_the_root_writes(tmp_path):
    communicator = FakeCommunicator(1, 2, broadcast=lambda told: told)
    with Runtime(communicator).use():
        fit(make(run_eagerly=False), CSVLogger(str(tmp_path / "log.csv")), epochs=2)
    assert os.listdir(tmp_path) == []
    assert communicator.calls.count("broadcast_object") == 3  # the opening, and each line


def test_a_failure_of_the_root_is_raised_on_the_others(tmp_path):
    communicator = FakeCommunicator(1, 2, broadcast=lambda told: (None, (False, "disk full")))
    with (
        Runtime(communicator).use(),
        pytest.raises(RankError, match="Rank 0 failed: disk full"),
    ):
        fit(make(run_eagerly=False), CSVLogger(str(tmp_path / "log.csv")))


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        fit(make(), CSVLogger(str(tmp_path / "file" / "log.csv")))


def test_without_validation_rates_have_no_column_of_it(tmp_path):
    header = {}
    for module in (keras.callbacks, callbacks):
        path = tmp_path / module.__name__
        rate = module.LearningRateScheduler(lambda epoch: 0.5)
        fit(make(), rate, module.CSVLogger(str(path)), validation_data=None)
        header[module] = path.read_text().splitlines()[0].split(",")
    assert [n for n in header[keras.callbacks] if n != "val_learning_rate"] == header[callbacks]


def test_an_array_of_several_axes_stays_in_its_line(tmp_path):
    path = tmp_path / "log.csv"
    fit(make(), Script(cast(Any, [np.arange(60.0).reshape(2, 30)])), callbacks.CSVLogger(str(path)))
    assert len(path.read_text().splitlines()) == 2
    (row,) = read(path)
    assert row["val_loss"] == f'"[{", ".join(f"{n}.0" for n in range(60))}]"'
