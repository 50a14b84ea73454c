"""The pods that all targets share: one template from the settings."""

from __future__ import annotations

import hashlib
from typing import Any

from orchestrator.config import Settings
from orchestrator.kubernetes.checks import grace_seconds
from orchestrator.kubernetes.settings import Kubernetes
from orchestrator.kubernetes.texts import document

Tree = dict[str, Any]

SSH_PORT = 2222
UID = 10001  # of the image's user; images of Ubuntu have one with 1000
APP = "keras-orchestrator"
SETTINGS_FILE = "/etc/orchestrator/settings.yaml"
SSH_KEYS = "/home/orchestrator/.ssh"
HOSTFILE = "/etc/mpi/hostfile"  # where both operators mount it
SCRIPTS = "/opt/orchestrator/pod"
# Seconds, each after the one before: the ranks end, whoever started them has seen it, the pod.
LAUNCH_MARGIN, POD_MARGIN, KILL_MARGIN = 5, 10, 20


def labels(k: Kubernetes, component: str | None = None) -> Tree:
    """The labels of an object of this job, and those that selectors use."""
    found = {"app.kubernetes.io/name": APP, "app.kubernetes.io/instance": k.name}
    return found | ({"app.kubernetes.io/component": component} if component else {})


def metadata(k: Kubernetes, name: str, component: str | None = None) -> Tree:
    """An object's metadata."""
    place = {"namespace": k.namespace} if k.namespace else {}
    return {"name": name, **place, "labels": labels(k, component)}


def queue_labels(k: Kubernetes) -> Tree:
    """What Kueue reads on a job."""
    queue = {"kueue.x-k8s.io/queue-name": k.queue} if k.queue else {}
    return queue | ({"kueue.x-k8s.io/priority-class": k.queue_priority} if k.queue_priority else {})


def settings_text(settings: Settings) -> str:
    """What was set, as the ranks read it; what is the cluster's is not for them."""
    tree = settings.model_dump(exclude={"kubernetes"}, exclude_unset=True)
    return document(tree)


def rank_command(settings: Settings) -> list[str]:
    """What each rank runs."""
    return settings.kubernetes.command or [
        "python",
        "launch/train.py",
        "--config",
        SETTINGS_FILE,
    ]


def launch_command(settings: Settings, *, hostfile: str | None) -> list[str]:
    """`orchestrator launch` of all ranks: on the hosts of a file, or in this pod."""
    k = settings.kubernetes
    ranks = k.ranks_per_node * (k.nodes if hostfile else 1)
    mpi = settings.run.backend == "mpi"
    # horovodrun's own search takes what all pods have, which may be the loopback.
    interface = f"--network-interface {k.network_interface or 'eth0'}"
    return [
        *("orchestrator", "launch", "-np", str(ranks)),
        *(("--hostfile", hostfile) if hostfile else ()),
        *(("--mpi",) if mpi else ()),
        *(("--launcher-args", interface) if hostfile and not mpi else ()),
        *("--grace", str(grace_seconds(settings) + LAUNCH_MARGIN)),
        "--",
        *rank_command(settings),
    ]


def pod(settings: Settings, component: str, container: Tree, *, ranks: bool) -> Tree:
    """A pod template.

    Args:
        settings: All settings of the run.
        component: The pod's role, for its label.
        container: What is particular to its container: name, command, ports, probes.
        ranks: Whether ranks run in it, which takes the node's resources, the settings and
            credentials, or it only starts them elsewhere.
    """
    k = settings.kubernetes
    digest = hashlib.sha256(settings_text(settings).encode()).hexdigest()
    spec: Tree = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds(settings) + KILL_MARGIN,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(k, container, ranks=ranks)],
        "volumes": _volumes(k, ranks=ranks),
    }
    if k.service_account and ranks:
        spec["serviceAccountName"] = k.service_account
    if k.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": k.image_pull_secret}]
    if k.priority_class:
        spec["priorityClassName"] = k.priority_class
    if ranks:
        spec |= _placement(k, component)
    return {
        "metadata": {
            "labels": labels(k, component),
            "annotations": {"checksum/settings": digest},
        },
        "spec": spec,
    }


def _container(k: Kubernetes, particular: Tree, *, ranks: bool) -> Tree:
    name, *command = particular["name"], *particular["command"]
    # A launcher's too: it hands ranks its own variables, over those of the pod they run in.
    env = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1", **k.env}
    container: Tree = {
        "name": name,
        "image": k.image,
        "command": [literal(word) for word in command],
        **{key: value for key, value in particular.items() if key not in ("name", "command")},
        "env": [{"name": n, "value": literal(v)} for n, v in env.items()],
        "resources": _resources(k) if ranks else LAUNCHER_RESOURCES,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }
    if ranks:
        if k.credentials_secret:
            container["envFrom"] = [{"secretRef": {"name": k.credentials_secret}}]
        container["volumeMounts"] += [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "settings", "mountPath": "/etc/orchestrator", "readOnly": True},
            *([{"name": "data", "mountPath": k.volume_path}] if k.volume_claim else []),
        ]
    return container


LAUNCHER_RESOURCES: Tree = {
    "requests": {"cpu": "250m", "memory": "2Gi"},
    "limits": {"memory": "2Gi"},
}


def literal(text: str) -> str:
    """What Kubernetes makes this text of: `$(NAME)` becomes a variable's value, and `$$` a `$`."""
    return text.replace("$", "$$")


def _resources(k: Kubernetes) -> Tree:
    gpus = {k.gpu_resource: k.gpus_per_node} if k.gpus_per_node else {}
    requests = {"cpu": k.cpu, "memory": k.memory, "ephemeral-storage": k.scratch, **gpus}
    # No limit on CPU: a throttled rank holds all others up.
    return {"requests": requests, "limits": {"memory": k.memory, **gpus}}


def _volumes(k: Kubernetes, *, ranks: bool) -> list[Tree]:
    if not ranks:
        return [{"name": "scratch", "emptyDir": {"sizeLimit": "256Mi"}}]
    claim = {"claimName": k.volume_claim}
    return [
        {"name": "scratch", "emptyDir": {"sizeLimit": k.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": k.shm}},
        {"name": "settings", "configMap": {"name": f"{k.name}-settings"}},
        *([{"name": "data", "persistentVolumeClaim": claim}] if k.volume_claim else []),
    ]


def _placement(k: Kubernetes, component: str) -> Tree:
    placement: Tree = {
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels(k, component)},
            }
        ]
    }
    if k.node_selector:
        placement["nodeSelector"] = dict(k.node_selector)
    if k.tolerations:
        placement["tolerations"] = [toleration(taint) for taint in k.tolerations]
    return placement


def toleration(taint: str) -> Tree:
    """`key=value:Effect` or `key:Effect` as Kubernetes writes it."""
    name, _, effect = taint.rpartition(":")
    key, equals, value = name.partition("=")
    if equals:
        return {"key": key, "operator": "Equal", "value": value, "effect": effect}
    return {"key": key, "operator": "Exists", "effect": effect}
