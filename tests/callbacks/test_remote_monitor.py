"""RemoteMonitor against a server on this machine."""

from __future__ import annotations

import json
import math
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from orchestrator.agreement import RankError
from orchestrator.callbacks import LambdaCallback, RemoteMonitor
from tests.callbacks import ranks
from tests.callbacks.models import Script, fit, make


@pytest.fixture
def server():
    """Keeps (path, headers, body) of what is posted."""
    posts = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            posts.append((self.path, dict(self.headers), body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        root = f"http://127.0.0.1:{served.server_port}"
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield SimpleNamespace(posts=posts, root=root)
        served.shutdown()
        thread.join()


def test_a_form(server):
    history = fit(make(), RemoteMonitor(server.root), epochs=2)
    assert [path for path, _, _ in server.posts] == ["/publish/epoch/end/"] * 2
    for epoch, (_, headers, body) in enumerate(server.posts):
        assert headers["Content-Type"] == "application/x-www-form-urlencoded"
        sent = json.loads(urllib.parse.parse_qs(body)["data"][0])
        assert sent == {"epoch": epoch, **{k: v[epoch] for k, v in history.history.items()}}


def test_json_with_headers(server):
    monitor = RemoteMonitor(
        server.root, path="/here", headers={"X-Run": "seven"}, send_as_json=True
    )
    history = fit(make(), monitor)
    ((path, headers, body),) = server.posts
    assert path == "/here"
    assert (headers["Content-Type"], headers["X-Run"]) == ("application/json", "seven")
    assert json.loads(body)["val_loss"] == history.history["val_loss"][0]


def test_numpy_values(server):
    monitor = RemoteMonitor(server.root, field="x")
    monitor.set_model(make())
    monitor.on_epoch_end(
        3, {"a": np.float32(0.5), "b": np.array([2]), "c": np.arange(2), "d": np.float64(1)}
    )
    ((_, _, body),) = server.posts
    sent = json.loads(urllib.parse.parse_qs(body)["x"][0])
    assert sent == {"epoch": 3, "a": 0.5, "b": 2, "c": [0, 1], "d": 1.0}


def test_nobody_there_is_a_warning():
    with pytest.warns(UserWarning, match="Could not reach RemoteMonitor root server at http"):
        fit(make(), RemoteMonitor("http://127.0.0.1:9"))


def test_a_server_that_does_not_answer_is_a_warning():
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:
        monitor = RemoteMonitor(f"http://127.0.0.1:{silent.server_port}", timeout=0.2)
        with pytest.warns(UserWarning, match="Could not reach"):
            fit(make(), monitor)


@pytest.mark.parametrize("kind", [keras.callbacks.RemoteMonitor, RemoteMonitor])
def test_nan_which_json_cannot_hold_is_a_warning(server, kind):
    diverged = Script([math.nan, 0.5], "loss")
    with pytest.warns(UserWarning, match="Could not reach RemoteMonitor root server at http"):
        fit(make(), diverged, kind(server.root, send_as_json=True), epochs=2)
    assert [json.loads(body)["loss"] for _, _, body in server.posts] == [0.5]


@pytest.mark.parametrize("kind", [keras.callbacks.RemoteMonitor, RemoteMonitor])
def test_nan_in_a_form_is_sent(server, kind):
    fit(make(), Script([math.nan], "loss"), kind(server.root))
    ((_, _, body),) = server.posts
    assert math.isnan(json.loads(urllib.parse.parse_qs(body)["data"][0])["loss"])


def test_two_ranks_send_global_logs_once(server):
    def rank(runtime):
        return ranks.fit(runtime, [RemoteMonitor(server.root, send_as_json=True)]).history

    history, _ = ranks.run(rank)
    sent = [json.loads(body) for _, _, body in server.posts]
    assert [one["val_loss"] for one in sent] == history["val_loss"]


@pytest.mark.parametrize("as_json", [True, False])
def test_what_cannot_be_sent_ends_both_ranks(server, as_json):
    def rank(runtime):
        odd = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(odd=object()))
        with pytest.raises(RankError if runtime.rank else TypeError, match="not JSON serializable"):
            ranks.fit(runtime, [odd, RemoteMonitor(server.root, send_as_json=as_json)])

    ranks.run(rank)
    assert server.posts == []
