"""submit, status, logs and delete, against a stand-in of the API server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from orchestrator import jobs
from orchestrator.cluster import Cluster
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


def submit(connect, server, target="mpijob", **options):
    said: list[str] = []
    manifests = render(cases.settings(), target)
    code = jobs.submit(connect(server), manifests, said.append, every=60, **options)
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


@pytest.mark.parametrize("attempt", [Attempt((75,)), Attempt((137,), reason="Evicted")])
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
