"""The code of docs/callbacks.md and docs/custom-callbacks.md runs as it stands, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import pytest

from orchestrator import callbacks
from orchestrator.agreement import RankError
from tests.callbacks import ranks
from tests.callbacks.test_backup_and_restore import Interrupt, end

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def classes(number):
    names = {}
    exec(blocks("custom-callbacks.md")[number], names)
    return names


def test_seconds_by_rank(tmp_path):
    kind = classes(0)["SecondsByRank"]
    path = tmp_path / "seconds.txt"
    history, _ = ranks.run(lambda runtime: ranks.fit(runtime, [kind(path)]).history)
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [line[0] for line in lines] == ["0", "1"]
    assert [float(line[1]) for line in lines] == pytest.approx(history["loss"], abs=1e-4)
    assert all(float(s) > 0 for line in lines for s in line[2:])
    assert [len(line) for line in lines] == [4, 4]


def test_what_fails_under_rank_0_ends_both(tmp_path):
    kind = classes(0)["SecondsByRank"]

    def rank(runtime):
        with pytest.raises(RankError if runtime.rank else IsADirectoryError, match="directory"):
            ranks.fit(runtime, [kind(tmp_path)])

    ranks.run(rank)


def test_the_knob(tmp_path):
    kind = classes(1)["Knob"]
    path = tmp_path / "knob"

    def rank(runtime):
        turn = callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: (
                path.write_text("0.5") if runtime.is_root and epoch in (0, 2) else None
            )
        )
        knob, guard = kind(path), callbacks.ConsistencyGuard()
        saver = callbacks.CSVLogger(str(tmp_path / "log.csv"))
        ranks.fit(runtime, [knob, turn, guard, saver], epochs=4)
        return knob.turned, float(knob.model.optimizer.learning_rate.numpy())

    for turned, rate in ranks.run(rank):
        assert turned == [[1, 0.5], [3, 0.5]]
        assert rate == pytest.approx(0.0025)


def test_the_knob_remembers(tmp_path):
    kind = classes(1)["Knob"]

    def run(*others):
        (tmp_path / "knob").write_text("0.5")

        def rank(runtime):
            knob = kind(tmp_path / "knob")
            saver = callbacks.BackupAndRestore(str(tmp_path / "b"), preempt_grace=None)
            try:
                ranks.fit(runtime, [knob, saver, *(make() for make in others)], epochs=3)
            except InterruptedError:
                end(saver)
            return knob.turned

        return ranks.run(rank)

    assert run(lambda: Interrupt(9)) == [[[0, 0.5]]] * 2
    assert run() == [[[0, 0.5], [2, 0.5]]] * 2


def test_rates_and_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with_mlflow, rates = blocks("callbacks.md")

    def rank(runtime):
        model, data = ranks.model(runtime), ranks.data()
        names = {"callbacks": callbacks, "model": model}
        names |= {which: runtime.shard(data, batch_size=4) for which in ("train", "val")}
        exec(with_mlflow, names)
        exec(rates, names)
        return names["rate"]

    try:
        assert ranks.run(rank) == [0.2, 0.2]
        assert len(mlflow.MlflowClient().search_runs(["0"])) == 1
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(before)
