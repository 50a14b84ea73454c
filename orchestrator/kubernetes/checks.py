"""What must hold between settings before they become manifests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.config import SettingError, Settings
from orchestrator.kubernetes.settings import Kubernetes

TARGETS = ("mpijob", "job", "trainjob")
# What the image holds, the pods mount, and an operator or a cloud's identity mounts in them.
_TAKEN = (
    *("/app", "/opt/orchestrator", "/opt/venv", "/home/orchestrator", "/tmp", "/etc"),
    *("/bin", "/lib", "/lib64", "/sbin", "/usr", "/dev", "/proc", "/sys", "/run", "/var/run"),
)
_LONGEST_GRACE = 86_400
_UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SECRET_NAME = re.compile(
    r"secret|password|passwd|credential|private_?key|(api|access|account|auth)_?(key|token)"
    r"|(^|_)token$|sas_token",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"^(AKIA|ASIA)[A-Z0-9]{16}$"  # an AWS access key's name
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|^\w[\w+.-]*://[^/@\s]*:[^/@\s]*@"  # a URL with a password
)


def check(settings: Settings, target: str) -> None:
    """Refuses what would make a manifest that cannot run.

    Args:
        settings: All settings of the run.
        target: `mpijob`, `job` or `trainjob`.

    Raises:
        SettingError: With one line for each thing that is wrong.
    """
    if target not in TARGETS:
        raise SettingError(f"target={target!r} is not allowed: one of {', '.join(TARGETS)}.")
    k = settings.kubernetes
    problems = [
        *_shape(k, target),
        *_times(settings),
        *_backend(settings, target),
        *_storage(settings),
        *_secrets(settings),
    ]
    if problems:
        raise SettingError("\n".join(problems))


def grace_seconds(settings: Settings) -> int:
    """`run.preempt_grace`: seconds from SIGTERM until a rank must have ended."""
    return math.ceil(settings.run.preempt_grace)


def size(quantity: str) -> int:
    """Bytes of a quantity as `kubernetes.memory` allows it, such as `8Gi`."""
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


def secret_name(name: str) -> bool:
    """Whether a setting or variable of this name is likely to hold a credential."""
    return bool(_SECRET_NAME.search(name))


def secret_value(value: str) -> bool:
    """Whether a text is or holds a credential, by its form."""
    return bool(_SECRET_VALUE.search(value))


def _shape(k: Kubernetes, target: str) -> Iterator[str]:
    if k.image is None:
        yield (
            "kubernetes.image is not set, and it has no default. Build one from k8s/Dockerfile, "
            "push it, and set kubernetes.image=REGISTRY/NAME@sha256:DIGEST."
        )
    if size(k.shm) >= size(k.memory):
        yield (
            f"kubernetes.shm={k.shm} is not allowed: /dev/shm is part of kubernetes.memory="
            f"{k.memory} and must leave room for the ranks. Set less shm or more memory."
        )
    if k.service_account_annotations and k.service_account is None:
        yield (
            "kubernetes.service_account_annotations is set, kubernetes.service_account is not: "
            "name the account to make with them."
        )
    if k.queue_priority and not k.queue:
        yield "kubernetes.queue_priority is set without kubernetes.queue: set the LocalQueue too."
    if k.keep_hours is not None and target == "trainjob":
        yield (
            f"kubernetes.keep_hours={k.keep_hours:g} is not allowed with target trainjob: a "
            "TrainJob stays until it is deleted. Leave keep_hours out, or use mpijob or job."
        )


def _times(settings: Settings) -> Iterator[str]:
    if not settings.run.preempt_grace <= _LONGEST_GRACE:
        yield (
            f"run.preempt_grace={settings.run.preempt_grace:g} is not allowed on Kubernetes: at "
            f"most {_LONGEST_GRACE} seconds. A node that is taken away waits for minutes at best."
        )


def _backend(settings: Settings, target: str) -> Iterator[str]:
    k, backend = settings.kubernetes, settings.run.backend
    ranks = f"kubernetes.nodes={k.nodes} and kubernetes.ranks_per_node={k.ranks_per_node}"
    if backend in ("mirrored", "single") and (target, k.nodes, k.ranks_per_node) != ("job", 1, 1):
        yield (
            f"run.backend={backend} is one process, got target {target}, {ranks}. "
            "Use target job with one of each, or another backend."
        )
        return
    if backend == "mpi" and target == "job" and k.nodes > 1:
        yield (
            f"run.backend=mpi cannot start on {k.nodes} nodes with target job, whose ranks meet "
            "over Gloo. Use target mpijob, or run.backend=horovod."
        )
    if k.gpus_per_node and backend != "mirrored" and k.ranks_per_node > k.gpus_per_node:
        yield (
            f"kubernetes.ranks_per_node={k.ranks_per_node} is more than kubernetes.gpus_per_node="
            f"{k.gpus_per_node}: a rank takes a GPU of its own. Set ranks_per_node to the GPUs."
        )


def _storage(settings: Settings) -> Iterator[str]:
    """A container's root is read-only, and a node's disk is lost with it."""
    k = settings.kubernetes
    taken = [one for one in _TAKEN if _within(one, k.volume_path) or _within(k.volume_path, one)]
    if taken:
        yield (
            f"kubernetes.volume_path={k.volume_path} is not allowed: {' and '.join(taken)} in the "
            "container would be covered, or cover it. Choose another, such as /data."
        )
    roots = ["/tmp", *([k.volume_path] if k.volume_claim else [])]
    for key, url in (("run.dir", settings.run.dir), ("checkpoint.url", settings.checkpoint.url)):
        if url is None or re.match(r"\w[\w+.-]*://", url):
            continue
        if not any(url.startswith(f"{root}/") for root in roots):
            yield (
                f"{key}={url!r} cannot be written in a container: its root is read-only. Use a "
                "URL such as s3://BUCKET/RUN, a folder in kubernetes.volume_path with "
                "kubernetes.volume_claim set, or, to lose it with the pod, one in /tmp."
            )


def _within(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def _secrets(settings: Settings) -> Iterator[str]:
    """The ConfigMap, the environment and the arguments are read by more people than a Secret."""
    advice = (
        "holds a credential. Use workload identity (kubernetes.service_account), or a Secret "
        "(kubernetes.credentials_secret) whose keys become environment variables"
    )
    for path, value in _leaves("", settings.model_dump()):
        *_, name = path.split(".")
        # These two hold the name of a Secret.
        if path in ("kubernetes.credentials_secret", "kubernetes.image_pull_secret"):
            continue
        if isinstance(value, str) and value and (secret_name(name) or secret_value(value)):
            yield f"{path} {advice}."


def _leaves(path: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(f"{path}.{key}".lstrip("."), value)
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(f"{path}.{index}", value)
    else:
        yield path, tree
