"""All manifests of a run: the job of the chosen kind and what stands around it."""

from __future__ import annotations

from orchestrator.config import Settings
from orchestrator.kubernetes import targets
from orchestrator.kubernetes.checks import check
from orchestrator.kubernetes.pods import Tree, labels, metadata, settings_text
from orchestrator.kubernetes.settings import Kubernetes
from orchestrator.kubernetes.texts import documents

HEADER = "# Made by `orchestrator k8s render`: change the settings, not this file.\n"
_JOBS = {"mpijob": targets.mpijob, "job": targets.job, "trainjob": targets.trainjob}


def render(settings: Settings, target: str | None = None) -> list[Tree]:
    """The manifests of a run, in the order to apply them.

    Args:
        settings: All settings of the run.
        target: `mpijob`, `job` or `trainjob`; by default `kubernetes.target`.

    Raises:
        SettingError: The settings make no manifests that could run.
    """
    k = settings.kubernetes
    target = target or k.target
    check(settings, target)
    config: Tree = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(k, f"{k.name}-settings"),
        "data": {"settings.yaml": settings_text(settings)},
    }
    return [
        *_account(k),
        config,
        *_network_policy(k),
        *_disruption_budget(k, pods=k.nodes + (target != "job")),
        *_JOBS[target](settings),
    ]


def as_yaml(manifests: list[Tree]) -> str:
    """Manifests as one YAML stream."""
    return HEADER + documents(manifests)


def _account(k: Kubernetes) -> list[Tree]:
    if not k.service_account or not k.service_account_annotations:
        return []
    about = metadata(k, k.service_account)
    about["annotations"] = dict(k.service_account_annotations)
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": about,
            "automountServiceAccountToken": False,
        }
    ]


def _network_policy(k: Kubernetes) -> list[Tree]:
    if not k.network_policy:
        return []
    own = {"matchLabels": labels(k)}
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(k, k.name),
            "spec": {
                "podSelector": own,
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": own}]}],
            },
        }
    ]


def _disruption_budget(k: Kubernetes, *, pods: int) -> list[Tree]:
    """One pod at a time: the run ends with the first, and starts again when it is back."""
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata(k, k.name),
            "spec": {
                # Of a job's pods no other form is allowed: their number is not known to it.
                "minAvailable": pods - 1 if k.drainable else pods,
                "selector": {"matchLabels": labels(k)},
            },
        }
    ]
