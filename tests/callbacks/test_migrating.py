"""The scripts of docs/migrating.md run; Horovod's before as far as it gets on Keras 3."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

import pytest

from tests.distributed import launcher

TEXT = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT, re.DOTALL))


def run(name, backend, size, folder):
    """Runs a script in `folder`; returns its output and what it put into history.csv."""
    script = folder / f"{name}.py"
    # The launchers start in the repository's root, and the script writes where it is.
    script.write_text(f"import os\nos.chdir({str(folder)!r})\n{SCRIPTS[name]}")
    finished = launcher.launch(backend, size, [str(script)], folder, deadline=200)
    assert finished.returncode == 0, launcher.tails(folder)
    with open(folder / "history.csv", newline="") as file:
        return finished.output, list(csv.DictReader(file))


def test_there_are_two_guides():
    assert set(SCRIPTS) == {"horovod_before", "horovod_after", "keras_before", "keras_after"}
    for code in SCRIPTS.values():
        ast.parse(code)


@pytest.mark.slow
@pytest.mark.distributed
def test_horovods_script_does_not_run_on_keras_3(tmp_path):
    """As the page says; where it does one day, the guide is to show what it gives."""
    script = tmp_path / "horovod_before.py"
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{SCRIPTS['horovod_before']}")
    finished = launcher.launch("none", 1, [str(script)], tmp_path, deadline=200)
    assert finished.returncode == 1, launcher.tails(tmp_path)
    (error,) = re.findall(r"^AttributeError: (.*)$", finished.output, re.MULTILINE)
    assert error == "module 'keras.backend' has no attribute 'get_value'"
    assert f"`{error}`" in TEXT


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return run("keras_before", "none", 1, tmp_path_factory.mktemp("before"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("backend", "size"), [("none", 1), ("horovod", 2)])
def test_plain_keras_gives_the_same(before, backend, size, tmp_path):
    output, rows = run("keras_after", backend, size, tmp_path)
    theirs, expected = before
    assert len(rows) == len(expected)
    for ours, row in zip(rows, expected, strict=True):
        for name, value in row.items():
            assert float(ours[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    loss = re.compile(r"Result: .*'loss': (?:np\.float64\()?([0-9.]+)")
    (ours_last,), (theirs_last,) = (loss.findall(text) for text in (output, theirs))
    assert float(ours_last) == pytest.approx(float(theirs_last), rel=1e-3)
    assert (tmp_path / "model.keras").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_horovods_script(backend, tmp_path):
    output, rows = run("horovod_after", backend, 2, tmp_path)
    warm = [0.1 / 2 * ((epoch + 1) / 3 + 1) for epoch in range(3)]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([*warm, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert float(rows[-1]["val_accuracy"]) > 0.9
    assert "finished gradual learning rate warmup to 0.1" in output
    assert len(list(tmp_path.glob("checkpoint-*.keras"))) == 8
