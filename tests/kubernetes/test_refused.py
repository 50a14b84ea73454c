"""Settings that make no manifests, and what is said of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.config import SettingError
from orchestrator.kubernetes.pods import HOSTFILE, SCRIPTS, SETTINGS_FILE, SSH_KEYS
from orchestrator.kubernetes.render import render

from . import kubelet
from .cases import ROOT, TARGETS, all_pods, rendered, settings


def refusal(target="mpijob", **sections):
    with pytest.raises(SettingError) as caught:
        render(settings(**sections), target)
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "sections", "words"),
    [
        ("mpijob", {"kubernetes": {"image": None}}, "kubernetes.image is not set"),
        ("mpijob", {"kubernetes": {"shm": "8192Mi"}}, "kubernetes.shm=8192Mi"),
        ("mpijob", {"kubernetes": {"ranks_per_node": 3}}, "kubernetes.gpus_per_node=2"),
        ("mpijob", {"run": {"backend": "mirrored"}}, "run.backend=mirrored is one process"),
        ("job", {"run": {"backend": "single"}}, "kubernetes.nodes=2"),
        ("job", {"run": {"backend": "mpi"}}, "Use target mpijob"),
        ("job", {"run": {"dir": "runs/a"}}, "run.dir='runs/a' cannot be written"),
        ("job", {"run": {"dir": "/data/a"}}, "kubernetes.volume_claim"),
        ("job", {"checkpoint": {"url": "/tmpfoo"}}, "checkpoint.url='/tmpfoo'"),
        ("job", {"run": {"dir": "s3://me:secret@host/b"}}, "run.dir holds a credential"),
        ("job", {"model": {"options": {"api_key": "x"}}}, "model.options.api_key holds"),
        ("job", {"kubernetes": {"env": {"DB_PASSWORD": "x"}}}, "kubernetes.env.DB_PASSWORD"),
        ("job", {"kubernetes": {"command": ["a", "AKIAABCDEFGHIJKLMNOP"]}}, "command.1 holds"),
        ("job", {"kubernetes": {"volume_path": "/tmp"}}, "volume_path=/tmp is not allowed"),
        ("trainjob", {"kubernetes": {"keep_hours": 0}}, "kubernetes.keep_hours=0 is not allowed"),
        ("job", {"kubernetes": {"queue_priority": "p"}}, "kubernetes.queue"),
        ("job", {"kubernetes": {"service_account_annotations": {"a": "b"}}}, "service_account"),
        ("job", {"run": {"preempt_grace": float("inf")}}, "run.preempt_grace=inf"),
        ("pods", {}, "target='pods' is not allowed: one of mpijob, job, trainjob"),
    ],
)
def test_refused(target, sections, words):
    said = refusal(target, **sections)
    assert words in said
    assert len(said.splitlines()) == 1
    for value in ("secret@", "AKIA"):
        assert value not in said


def places():
    """Paths in the image, of the pods' volumes, and of what the operator mounts."""
    yield from ("/", "/proc", "/sys", "/dev", "/var/run/secrets/eks.amazonaws.com")
    yield from ("/etc/passwd", "/etc/hosts", "/run/sshd", "/bin", "/sbin", "/lib", "/lib64")
    image = kubelet.Image()
    yield from (image.folder, *image.env["PATH"].split(":"))
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8")
    yield from re.findall(r"(?m)^COPY .* (/\S+?)/?$", dockerfile)
    yield from (SCRIPTS, SETTINGS_FILE, SSH_KEYS, HOSTFILE)
    for target in TARGETS:
        for pod in all_pods(rendered(target)):
            yield from (one["mountPath"] for one in pod["spec"]["containers"][0]["volumeMounts"])


@pytest.mark.parametrize("place", sorted(set(places())))
def test_a_volume_may_not_cover_what_is_there_nor_lie_in_it(place):
    above = [str(path) for path in Path(place).parents if path.name]
    for path in (place, *above, f"{place}/data"):
        if not re.fullmatch("(/[-A-Za-z0-9_]+)+", path):
            continue  # of another form than a volume's
        said = refusal(kubernetes={"volume_path": path})
        assert said.startswith(f"kubernetes.volume_path={path} is not allowed: ")
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "path", ["/data", "/mnt/runs", "/scratch", "/appdata", "/opt/data", "/etcd"]
)
def test_a_volume_may_be_anywhere_else(path):
    rendered("job", kubernetes={"volume_path": path})


def test_all_that_is_wrong_is_said_at_once():
    said = refusal(kubernetes={"image": None, "shm": "9Gi"}, run={"dir": "runs/a"})
    assert len(said.splitlines()) == 3
