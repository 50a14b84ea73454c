"""A job of each kind that the ranks can run as."""

from __future__ import annotations

import math

from orchestrator.config import Settings
from orchestrator.kubernetes.checks import grace_seconds
from orchestrator.kubernetes.pods import (
    HOSTFILE,
    POD_MARGIN,
    SCRIPTS,
    SSH_KEYS,
    SSH_PORT,
    Tree,
    labels,
    launch_command,
    metadata,
    pod,
    queue_labels,
    rank_command,
)
from orchestrator.kubernetes.settings import Kubernetes

RENDEZVOUS_PORT = 29400
PREEMPTED = 75
BAD_SETTINGS = 2


def mpijob(settings: Settings) -> list[Tree]:
    """An MPIJob of mpi-operator: a launcher, and workers that it reaches over ssh."""
    k = settings.kubernetes
    policy: Tree = {"cleanPodPolicy": "Running", "backoffLimit": k.max_restarts, **_ends(k)}
    spec: Tree = {
        "slotsPerWorker": k.ranks_per_node,
        "mpiImplementation": "OpenMPI",  # it is only the form of the hostfile
        "sshAuthMountPath": SSH_KEYS,
        "launcherCreationPolicy": "WaitForWorkersReady",
        "runPolicy": policy,
        "mpiReplicaSpecs": {
            "Launcher": {
                "replicas": 1,
                # A failed attempt's pod stays, with its log.
                "restartPolicy": "Never",
                "template": _launcher(settings, "launcher"),
            },
            "Worker": {
                "replicas": k.nodes,
                "restartPolicy": "OnFailure",
                "template": _worker(settings, "worker"),
            },
        },
    }
    return [_job(k, "kubeflow.org/v2beta1", "MPIJob", spec)]


def job(settings: Settings) -> list[Tree]:
    """An Indexed Job that needs no operator, and a headless Service where pods must meet."""
    k = settings.kubernetes
    container: Tree = {"name": "ranks", "command": _job_command(settings)}
    if k.nodes > 1:
        container["ports"] = [{"name": "rendezvous", "containerPort": RENDEZVOUS_PORT}]
    template = pod(settings, "node", container, ranks=True)
    template["spec"] = {"restartPolicy": "Never", "subdomain": k.name, **template["spec"]}
    spec: Tree = {
        "completionMode": "Indexed",
        "completions": k.nodes,
        "parallelism": k.nodes,
        # One failure ends the ranks of all nodes, and each is counted.
        "backoffLimit": k.max_restarts * k.nodes,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": _failure_policy("ranks"),
        **_ends(k),
        "template": template,
    }
    service: Tree = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(k, k.name),
        "spec": {
            "clusterIP": "None",
            # The ranks meet before any pod could be called ready.
            "publishNotReadyAddresses": True,
            "selector": labels(k, "node"),
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }
    return [*([service] if k.nodes > 1 else []), _job(k, "batch/v1", "Job", spec)]


def trainjob(settings: Settings) -> list[Tree]:
    """A TrainJob of Kubeflow Trainer 2 and the runtime it names; alpha, as its API is."""
    k = settings.kubernetes
    runtime: Tree = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata(k, k.name),
        "spec": {
            "mlPolicy": {
                "numNodes": k.nodes,
                "mpi": {
                    "numProcPerNode": k.ranks_per_node,
                    "mpiImplementation": "OpenMPI",
                    "sshAuthMountPath": SSH_KEYS,
                    "runLauncherAsNode": False,
                },
            },
            "template": {"spec": _job_set(settings)},
        },
    }
    spec: Tree = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime",
            "name": k.name,
        },
        "trainer": {"numNodes": k.nodes, "numProcPerNode": k.ranks_per_node},
    }
    if k.max_hours is not None:
        spec["activeDeadlineSeconds"] = _ends(k)["activeDeadlineSeconds"]
    return [runtime, _job(k, "trainer.kubeflow.org/v1alpha1", "TrainJob", spec)]


def _job_set(settings: Settings) -> Tree:
    """The jobs that Trainer makes of a TrainJob; it looks for containers named `node`."""
    launcher, worker = _launcher(settings, "node"), _worker(settings, "node")
    launcher["spec"]["restartPolicy"] = "Never"
    worker["spec"]["restartPolicy"] = "OnFailure"
    k = settings.kubernetes
    launcher_job = {
        "backoffLimit": k.max_restarts,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": _failure_policy("node"),
        "template": launcher,
    }
    # Each lost worker counts, a preempted one too.
    worker_job = {"backoffLimit": k.max_restarts * k.nodes, "template": worker}
    ancestor = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    return {
        "network": {"publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["launcher"]},
        "replicatedJobs": [
            {"name": "launcher", "template": {"metadata": ancestor, "spec": launcher_job}},
            {"name": "node", "template": {"spec": worker_job}},
        ],
    }


def _job(k: Kubernetes, version: str, kind: str, spec: Tree) -> Tree:
    about = metadata(k, k.name)
    about["labels"] |= queue_labels(k)
    return {"apiVersion": version, "kind": kind, "metadata": about, "spec": spec}


def _launcher(settings: Settings, name: str) -> Tree:
    command = [
        *("python", f"{SCRIPTS}/launcher.py", "--hostfile", HOSTFILE, "--"),
        *launch_command(settings, hostfile=HOSTFILE),
    ]
    return pod(settings, "launcher", {"name": name, "command": command}, ranks=False)


def _worker(settings: Settings, name: str) -> Tree:
    container: Tree = {
        "name": name,
        "command": [
            *("python", f"{SCRIPTS}/worker.py"),
            *("--grace", str(grace_seconds(settings) + POD_MARGIN)),
        ],
        "ports": [{"name": "ssh", "containerPort": SSH_PORT}],
        "readinessProbe": {"tcpSocket": {"port": "ssh"}, "periodSeconds": 5},
    }
    return pod(settings, "worker", container, ranks=True)


def _job_command(settings: Settings) -> list[str]:
    k = settings.kubernetes
    if k.nodes > 1:
        return [
            *("python", f"{SCRIPTS}/node.py", "--nodes", str(k.nodes)),
            *("--ranks", str(k.ranks_per_node), "--first", f"{k.name}-0.{k.name}"),
            *("--grace", str(grace_seconds(settings) + POD_MARGIN)),
            *(("--interface", k.network_interface) if k.network_interface else ()),
            "--",
            *rank_command(settings),
        ]
    if k.ranks_per_node > 1:
        return launch_command(settings, hostfile=None)
    return rank_command(settings)


def _failure_policy(container: str) -> Tree:
    """Which ends of a pod count: neither a drained node nor a preempted rank does."""

    def on_exit(code: int) -> Tree:
        return {
            "onExitCodes": {"containerName": container, "operator": "In", "values": [code]},
        }

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": disrupted},
            {"action": "Ignore", **on_exit(PREEMPTED)},
            {"action": "FailJob", **on_exit(BAD_SETTINGS)},
        ]
    }


def _ends(k: Kubernetes) -> Tree:
    ends: Tree = {}
    if k.max_hours is not None:
        ends["activeDeadlineSeconds"] = math.ceil(3600 * k.max_hours)
    if k.keep_hours is not None:
        ends["ttlSecondsAfterFinished"] = math.ceil(3600 * k.keep_hours)
    return ends
