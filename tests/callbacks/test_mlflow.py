"""MLflow's own Keras callback under `RankZero`, read back from its file store."""

from __future__ import annotations

import os

import mlflow
import pytest
from mlflow.keras import MlflowCallback

from orchestrator import callbacks
from tests.callbacks import ranks
from tests.callbacks.models import fit, make


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A local file store, and nothing asked of the network."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield tmp_path / "mlruns"
    mlflow.set_tracking_uri(before)


def logged(run_id: str, metric: str) -> list[float]:
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    return [
        m.value for m in sorted(client.get_metric_history(run_id, metric), key=lambda m: m.step)
    ]


def test_one_process(store):
    with mlflow.start_run() as run:
        history = fit(make(), callbacks.RankZero(MlflowCallback()), epochs=2)
    assert logged(run.info.run_id, "val_loss") == history.history["val_loss"]


def test_two_ranks_make_one_run_of_global_metrics(store):
    def rank(runtime):
        zero = callbacks.RankZero(lambda: MlflowCallback())
        runtime.on_root(lambda: mlflow.start_run().info.run_id)
        history = ranks.fit(runtime, [zero], epochs=3)
        return runtime.on_root(lambda: _ended()), history.history

    def _ended():
        active = mlflow.active_run()
        assert active is not None
        run_id = active.info.run_id
        mlflow.end_run()
        return run_id

    (run_id, history), _ = ranks.run(rank)
    assert logged(run_id, "loss") == history["loss"]
    assert logged(run_id, "val_mae") == history["val_mae"]
    assert sorted(logged(run_id, "validation_mae")) == pytest.approx(sorted(history["val_mae"]))
    client = mlflow.MlflowClient()
    data = client.get_run(run_id).data
    assert float(data.params["optimizer_learning_rate"]) == pytest.approx(0.01)
    assert [f.path for f in client.list_artifacts(run_id)] == ["model_summary.txt"]
    assert len(client.search_runs(["0"])) == 1
    assert os.path.isdir(store / "0" / run_id)
