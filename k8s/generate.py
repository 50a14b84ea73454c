"""Writes manifests.yaml beside each settings.yaml here: `.venv/bin/python k8s/generate.py`.

The overlays are rendered, not patched: kustomize replaces whole lists in a kind it does not know,
such as MPIJob, so that a patch of one variable would repeat the pod. `kubectl apply -k` takes them
as they are, and a kustomization of your own can still build on them.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.config import load
from orchestrator.kubernetes.render import as_yaml, render

HERE = Path(__file__).parent


def rendered(settings: Path) -> str:
    """The manifests of one settings file."""
    return as_yaml(render(load(settings)))


if __name__ == "__main__":
    for settings in sorted(HERE.glob("**/settings.yaml")):
        manifests = settings.with_name("manifests.yaml")
        manifests.write_text(rendered(settings), encoding="utf-8")
        print(manifests.relative_to(HERE.parent))
