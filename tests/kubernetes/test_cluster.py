"""submit, status, logs and delete, against a stand-in of the API server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import yaml
from kubernetes.client import ApiException
from urllib3.exceptions import ProtocolError

from orchestrator import jobs
from orchestrator.cluster import Cluster, in_words
from orchestrator.config import SettingError
from orchestrator.kubernetes.render import render

from . import api, cases
from .api import Attempt

INDEX_0 = {"batch.kubernetes.io/job-completion-index": "0"}
MPIJOBS = "/apis/kubeflow.org/v2beta1/namespaces/ml/mpijobs"


@pytest.fixture
def connect(tmp_path, monkeypatch):
    def connected(server):
        path = tmp_path / "kubeconfig"
        path.write_text(api.kubeconfig(server))
        # The client reads KUBECONFIG when it is imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        return Cluster()

    return connected


def submit(connect, server, target="mpijob", every=60.0, **options):
    said: list[str] = []
    manifests = render(cases.settings(), target)
    code = jobs.submit(connect(server), manifests, said.append, every=every, **options)
    return code, said


def changes(server):
    return [line for line in server.requests if not line.startswith("GET")]


def test_a_job_that_succeeds(connect):
    with api.serving(Attempt((0,))) as server:
        code, said = submit(connect, server)
    assert code == 0
    assert said == [
        "k8s: MPIJob train submitted",
        "train-0: epoch 1",
        "train-0: épilogue",
        "k8s: MPIJob train succeeded, exit code 0",
    ]
    apply = "?fieldManager=orchestrator&force=true"
    assert changes(server) == [
        f"PATCH /api/v1/namespaces/ml/configmaps/train-settings{apply}",
        f"PATCH /apis/networking.k8s.io/v1/namespaces/ml/networkpolicies/train{apply}",
        f"PATCH /apis/policy/v1/namespaces/ml/poddisruptionbudgets/train{apply}",
        f"POST {MPIJOBS}",
    ]
    sent = [body for body in server.bodies if body]
    assert sent == render(cases.settings(), "mpijob")


def test_changes_are_watched(connect):
    """Each wait is one stream, ended by its first event and not by its 60 s."""
    with api.serving(Attempt((75, 0)), first=INDEX_0) as server:
        code, _ = submit(connect, server, "job")
        watches = [line for line in server.requests if "watch=true" in line]
    assert code == 0
    jobs = "/apis/batch/v1/namespaces/ml/jobs?watch=true&fieldSelector=metadata.name%3Dtrain"
    assert watches == [
        f"GET {jobs}&resourceVersion={version}&timeoutSeconds=60" for version in ("1", "2")
    ]


def test_a_watch_that_comes_too_late_is_begun_anew(connect):
    with api.serving(Attempt((0,))) as server:
        client = connect(server)
        client.apply(render(cases.settings(), "mpijob"))
        job = jobs.job_of(render(cases.settings(), "mpijob"))
        job["metadata"]["resourceVersion"] = "0"
        client.wait(job, 0.01)  # 410
        client.wait(client.get(job), 60)
        assert server.pods[0]["status"]["phase"] == "Running"


def test_pods_that_the_cluster_itself_makes_anew_are_followed(connect):
    with api.serving(Attempt((75, 75, 0)), first=INDEX_0) as server:
        code, said = submit(connect, server, "job")
    assert code == 0
    assert [line for line in said if "epoch" in line] == [
        f"train-{index}: epoch 1" for index in range(3)
    ]


@pytest.mark.parametrize("attempt", [Attempt((75,)), Attempt((137,), ("Evicted",))])
def test_a_job_that_is_taken_away_is_made_anew(connect, attempt):
    with api.serving(attempt, Attempt((0,))) as server:
        code, said = submit(connect, server, resubmit=3)
    assert code == 0
    assert f"k8s: MPIJob train preempted, exit code {attempt.codes[-1]}" in said
    assert "k8s: MPIJob train submitted, attempt 2" in said
    jobs = [line for line in changes(server) if "mpijobs" in line]
    assert jobs == [f"POST {MPIJOBS}", f"DELETE {MPIJOBS}/train", f"POST {MPIJOBS}"]


def test_no_more_often_than_asked(connect):
    with api.serving(Attempt((75,)), Attempt((75,))) as server:
        code, _ = submit(connect, server, resubmit=1)
    assert code == 75
    assert sum("POST" in line for line in changes(server)) == 2


def test_a_failure_is_not_repeated(connect):
    with api.serving(Attempt((1, 2))) as server:
        code, said = submit(connect, server, resubmit=5)
    assert code == 2
    assert said[-1] == "k8s: MPIJob train failed, exit code 2"
    assert not [line for line in changes(server) if "DELETE" in line]


@pytest.mark.parametrize("last", [1, 2, 137])
def test_a_failure_after_an_eviction_is_one(connect, last):
    """The evicted pod of an earlier attempt is still there, and says nothing of the last."""
    with api.serving(Attempt((137, last), ("Evicted",)), Attempt((0,))) as server:
        code, said = submit(connect, server, resubmit=5)
    assert code == last
    assert said[-1] == f"k8s: MPIJob train failed, exit code {last}"
    assert not [line for line in changes(server) if "DELETE" in line]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        *[("log", fault) for fault in (api.CUT, 400, 404, 500)],
        *[("watch", fault) for fault in (api.CUT, 403, 410, 500)],
        *[("get", fault) for fault in (api.CUT, 429, 500)],
        *[("pods", 503), ("delete", 500), ("patch", 500)],
    ],
)
def test_a_fault_of_the_server_does_not_end_following(connect, kind, fault):
    with api.serving(Attempt((75,)), Attempt((0,))) as server:
        client = connect(server)
        manifests, said = render(cases.settings(), "mpijob"), []

        def say(line):
            said.append(line)
            # From now on, and so not of what is refused at first.
            if line == "k8s: MPIJob train submitted":
                server.faults[kind] = [fault]

        assert jobs.submit(client, manifests, say, resubmit=1, every=0.05) == 0
    assert server.faults == {kind: []}
    assert said[-1] == "k8s: MPIJob train succeeded, exit code 0"
    assert "train-1: épilogue" in said


def test_a_log_that_breaks_off_is_said_and_not_taken_up_again(connect):
    with api.serving(Attempt((0,))) as server:
        server.faults["log"] = [api.CUT]
        code, said = submit(connect, server, every=0.05)
        logs = [line for line in server.requests if "/log" in line]
    assert code == 0
    assert said[1:3] == ["train-0: epoch 1", "train-0: épilogue"]
    assert said[3].startswith("k8s: no more of the log of train-0: Response ended prem")
    assert len(logs) == 1


def test_a_log_that_is_not_there_yet_is_asked_for_again(connect):
    with api.serving(Attempt((0,))) as server:
        server.faults["log"] = [400]
        code, said = submit(connect, server, every=0.05)
    assert code == 0
    assert said[1] == "k8s: no log of train-0: 400 Bad Request"
    assert said[2:4] == ["train-0: epoch 1", "train-0: épilogue"]


def test_a_request_that_is_refused_ends_following(connect):
    with api.serving(Attempt((0,))) as server:
        server.faults["get"] = [401]
        with pytest.raises(ApiException, match="401"):
            submit(connect, server)


def test_a_server_that_stays_away_ends_following(connect, monkeypatch):
    monkeypatch.setattr(jobs, "_PATIENCE", 0.2)
    with api.serving(Attempt((0,))) as server:
        server.faults["get"] = 100 * [500]
        with pytest.raises(ApiException, match="500"):
            submit(connect, server, every=0.05)
    assert 2 < len(server.requests) < 50


def test_a_job_that_is_there_is_left_alone(connect):
    with api.serving(Attempt((0,))) as server:
        server.objects[f"{MPIJOBS}/train"] = {}
        with pytest.raises(SettingError, match=r"MPIJob train is there already: .*k8s delete"):
            submit(connect, server)


def test_no_cluster(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none")
    )
    with pytest.raises(SettingError, match="no cluster is configured"):
        Cluster()


def test_a_stream_whose_other_side_vanished_ends(connect):
    with api.serving() as server:
        pool = connect(server)._api.rest_client.pool_manager
    assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in pool.connection_pool_kw["socket_options"]


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ApiException(status=410, reason="Gone"), "410 Gone"),
        (ApiException(status=0, reason="SSLError\nEOF"), "0 SSLError EOF"),
        (ProtocolError("Connection broken", ConnectionResetError(104)), "Connection broken"),
    ],
)
def test_failures_in_words(failure, words):
    assert in_words(failure) == words


def test_as_from_a_shell(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(cases.GOOD))

    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", "from orchestrator.cli import main; main()", "k8s", *words],
            env={**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig")},
            capture_output=True, text=True, timeout=60, cwd=cases.ROOT,
        )  # fmt: skip

    with api.serving(Attempt((75,))) as server:
        (tmp_path / "kubeconfig").write_text(api.kubeconfig(server))
        done = run("status", str(settings))
        assert (done.returncode, done.stdout) == (1, "MPIJob train: it is not there\n")
        done = run("submit", str(settings))
        assert done.returncode == 75, done.stderr
        assert "train-0: épilogue" in done.stdout
        done = run("status", str(settings))
        assert done.returncode == 1
        assert done.stdout == "MPIJob train: Failed: Played\n  train-0: Failed exit code 75\n"
        assert run("logs", str(settings)).stdout == "train-0: epoch 1\ntrain-0: épilogue\n"
        done = run("delete", str(settings))
        assert done.stdout.splitlines() == [
            "deleted MPIJob train",
            "deleted PodDisruptionBudget train",
            "deleted NetworkPolicy train",
            "deleted ConfigMap train-settings",
        ]
        assert run("delete", str(settings)).stdout == "nothing of it is there\n"
    done = run("submit", str(settings), "--context", "other")
    assert done.returncode == 2
    assert "no cluster is configured" in done.stderr
