"""What ranks with metrics of their own do together is what Keras does with the global ones."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from orchestrator import callbacks
from tests.callbacks import deciding
from tests.distributed import problems
from tests.distributed.rank_plugin import once, three


def local_values(rank: int, size: int) -> list[float]:
    """Far from the others', with the global values as their mean."""
    side = 3.0 * (rank - (size - 1) / 2)
    signs = [1, -1, -1, 1, 1, -1, 1, 1, -1, 1, -1, -1, 1, -1]
    return [value + side * sign for value, sign in zip(deciding.VALUES, signs, strict=True)]


def fit_told(runtime, ours, epochs):
    """One step an epoch; the validation finds what the rank is told."""
    model, now = problems.line(), tf.Variable(tf.zeros(()))

    def told(y_true, y_pred):
        return tf.zeros_like(y_pred[:, 0]) + now

    model.compile(runtime.distribute(keras.optimizers.SGD(0.01)), "mse", metrics=[told])
    runtime.broadcast(model)
    values = local_values(runtime.rank, runtime.size)
    tell = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: now.assign(values[epoch])
    )
    data = problems.points(np.linspace(0, 1, 2 * runtime.size))
    return model, model.fit(
        runtime.shard(data, batch_size=2 * runtime.size),
        validation_data=runtime.shard(data, batch_size=2 * runtime.size),
        epochs=epochs,
        verbose=0,
        callbacks=[tell, *ours],
    )


@three
def test_decisions(runtime, communicator, shared_path, tmp_path):
    """Each epoch of each callback: stop, rate, best, wait, cooldown, and the files there."""
    watched = []
    for number, case in enumerate(deciding.CASES):
        (shared_path / str(number)).mkdir(exist_ok=True)
        folder = shared_path / str(number)
        watched.append(deciding.Watched(case.make(callbacks, folder), folder))
    model, history = fit_told(runtime, watched, len(deciding.VALUES))
    assert history.history[deciding.MONITOR] == deciding.VALUES

    # Only which files there are is compared; ours were written, so that their best is in them.
    model.save_weights = lambda path, overwrite: Path(path).touch()

    def keras_with(values, name):
        found = []
        for number, case in enumerate(deciding.CASES):
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            theirs = deciding.Watched(case.make(keras.callbacks, folder), folder)
            found.append(deciding.drive(theirs, model, values))
        return found

    expected = keras_with(deciding.VALUES, "global")
    alone = keras_with(local_values(runtime.rank, runtime.size), "local")
    for one, theirs, name in zip(watched, expected, deciding.IDS, strict=True):
        assert one.seen == theirs, name
    assert communicator.allgather_object([one.seen for one in watched]) == [expected] * runtime.size
    for number, others in enumerate(zip(*communicator.allgather_object(alone), strict=True)):
        assert any(one != expected[number] for one in others), deciding.IDS[number]


@three
def test_a_stop_ends_all_after_the_same_epoch(runtime, communicator):
    stop = callbacks.EarlyStopping(deciding.MONITOR, patience=3, mode="min")
    _, history = fit_told(runtime, [stop], len(deciding.VALUES))
    assert communicator.allgather_object(len(history.epoch)) == [6] * runtime.size


@pytest.fixture
def posted():
    """A server of this rank's own: its URL, and what was posted to it."""
    posts = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", posts
        server.shutdown()
        thread.join()


@three
def test_what_is_written_sent_and_scheduled(runtime, communicator, shared_path, posted):
    url, posts = posted
    generator = np.random.default_rng(runtime.rank)
    seen: list[dict] = []
    own = [
        callbacks.LearningRateScheduler(lambda epoch, lr: float(generator.random()) / 64),
        callbacks.CSVLogger(str(shared_path / "log.csv")),
        callbacks.RemoteMonitor(url, send_as_json=True),
        callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs))),
    ]
    _, history = fit_told(runtime, own, 4)
    drawn = np.random.default_rng(0).random(4) / 64
    assert history.history["learning_rate"] == pytest.approx(drawn.tolist(), rel=1e-6)
    assert history.history[deciding.MONITOR] == deciding.VALUES[:4]
    assert (
        communicator.allgather_object((seen, history.history))
        == [(seen, history.history)] * runtime.size
    )
    sent = [{"epoch": epoch, **logs} for epoch, logs in enumerate(seen)]
    assert posts == (sent if runtime.is_root else [])
    header, *lines = (shared_path / "log.csv").read_text().splitlines()
    column = header.split(",").index(deciding.MONITOR)
    assert [float(line.split(",")[column]) for line in lines] == deciding.VALUES[:4]


@three
def test_averages_are_swapped_on_all(runtime, communicator):
    model = problems.line()
    optimizer = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)
    model.compile(runtime.distribute(optimizer), "mse")
    runtime.broadcast(model)
    targets = np.arange(2 * runtime.size)
    part = runtime.shard(problems.points(targets), batch_size=2 * runtime.size)
    recorder = problems.Weights()
    own = [callbacks.SwapEMAWeights(swap_on_epoch=True), recorder]
    losses = model.fit(part, epochs=3, validation_data=part, verbose=0, callbacks=own).history
    weight, averages = 0.0, []
    for step in range(3):
        weight -= 0.05 * 2 * (weight - targets.mean())
        # Keras's average begins as the weights after the first step.
        averages.append(0.5 * averages[-1] + 0.5 * weight if step else weight)
    expected = [float(np.mean((average - targets) ** 2)) for average in averages]
    assert losses["val_loss"] == pytest.approx(expected, rel=1e-5)
    kept = [epoch[0].item() for epoch in recorder.epochs]
    assert kept == pytest.approx(averages, rel=1e-5)
    assert communicator.allgather_object(kept) == [kept] * runtime.size


@once
def test_mlflows_own_callback(runtime, communicator, shared_path, monkeypatch):
    import mlflow
    from mlflow.keras import MlflowCallback

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((shared_path / "mlruns").as_uri())
    made = callbacks.RankZero(lambda: MlflowCallback())
    _, history = fit_told(runtime, [made], 4)
    if runtime.is_root:
        mlflow.end_run()
        client = mlflow.MlflowClient()
        (run,) = client.search_runs(["0"])
        found = client.get_metric_history(run.info.run_id, deciding.MONITOR)
        assert [one.value for one in found] == history.history[deciding.MONITOR]
    assert (made.callback is not None) == runtime.is_root
    mlflow.set_tracking_uri(before)
    communicator.barrier()
    assert len(list((shared_path / "mlruns" / "0").glob("*/meta.yaml"))) == 1
