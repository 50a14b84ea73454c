"""`orchestrator k8s render` and `validate`, as from a shell."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from orchestrator.kubernetes.render import as_yaml, render

from .cases import GOOD, ROOT, settings


def run(*words):
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", "k8s", *words]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=ROOT
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return path


def test_render(file):
    result = run("render", file, "--target", "job", "kubernetes.nodes=5", "train.epochs=9")
    assert result.returncode == 0, result.stderr
    made = settings(kubernetes={"nodes": 5}, train={"epochs": 9})
    assert result.stdout == as_yaml(render(made, "job"))


def test_render_refuses_in_words(file):
    result = run("render", file, "run.dir=runs/a")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("orchestrator: run.dir='runs/a' cannot be written")
    result = run("render", file, "kubernetes.nodez=3")
    assert result.returncode == 2
    assert "Did you mean kubernetes.nodes?" in result.stderr


def test_trainjob_is_behind_a_flag(file):
    result = run("render", file, "--target", "trainjob")
    assert result.returncode == 2
    assert "--alpha" in result.stderr
    assert run("render", file, "--target", "trainjob", "--alpha").returncode == 0


def test_validate(tmp_path):
    good = tmp_path / "good.yaml"
    good.write_text(as_yaml(render(settings(), "mpijob")))
    result = run("validate", good)
    assert (result.returncode, result.stdout) == (0, "")
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("replicas: 1\n", "replicas: 2\n"))
    result = run("validate", bad)
    assert result.returncode == 2
    assert result.stdout == (
        f"{bad}: MPIJob/train spec.mpiReplicaSpecs.Launcher.replicas = 2: must be 1\n"
    )


def test_validate_says_what_it_cannot_read(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "twice.yaml").write_text("kind: A\nkind: B\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(GOOD))
    (tmp_path / "empty").mkdir()
    result = run("validate", tmp_path, tmp_path / "list.yaml", tmp_path / "empty", "nonesuch.yaml")
    lines = result.stdout.splitlines()
    assert result.returncode == 2
    assert len(lines) == 5
    assert "broken.yaml" in lines[0]
    assert "cannot be read" in lines[0]
    assert "'kind' stands twice" in lines[1]
    assert "is no Kubernetes object" in lines[2]
    assert "holds no .yaml" in lines[3]
    assert "nonesuch.yaml" in lines[4]
