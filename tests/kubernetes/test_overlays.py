"""The manifests in k8s/ and golden/: as rendered, valid, and taken by kustomize."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.config import load
from orchestrator.kubernetes.render import as_yaml, render

from .cases import ROOT, problems

K8S = ROOT / "k8s"
FOLDERS = [K8S / "base", *sorted((K8S / "overlays").iterdir())]
GOLDEN = Path(__file__).parent / "golden"
# For each kind of job that no overlay has, or has in another shape.
OTHERS = [("s3", "trainjob"), ("s3", "job"), ("gcs", "mpijob")]
KUBECTL = str(Path(sys.executable).parent / "kubectl")


def test_the_overlays_of_the_issue_are_there():
    names = {folder.name for folder in FOLDERS}
    assert {"base", "s3", "gcs", "pvc", "gpu", "cpu-demo", "kueue"} <= names


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_stands_there_is_what_the_settings_render(folder):
    stands = (folder / "manifests.yaml").read_text(encoding="utf-8")
    made = as_yaml(render(load(folder / "settings.yaml")))
    assert made == stands, "made anew with: .venv/bin/python k8s/generate.py"


@pytest.mark.parametrize(("overlay", "target"), OTHERS)
def test_golden(overlay, target):
    made = as_yaml(render(load(K8S / "overlays" / overlay / "settings.yaml"), target))
    golden = GOLDEN / f"{overlay}-{target}.yaml"
    assert made == golden.read_text(encoding="utf-8"), f"is it meant? Then: write it to {golden}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_takes_it(folder):
    result = subprocess.run(
        [KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    built = list(yaml.safe_load_all(result.stdout))
    stands = list(yaml.safe_load_all((folder / "manifests.yaml").read_text(encoding="utf-8")))

    def key(one):
        return one["kind"], one["metadata"]["name"]

    assert sorted(built, key=key) == sorted(stands, key=key)
    assert problems(built) == []
