"""The section `kubernetes` of a run's settings. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

_LABEL = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
_DOMAIN = r"([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?){0,2}/)"
_KEY = f"{_DOMAIN}?{_LABEL}"
_EFFECT = "(NoSchedule|PreferNoSchedule|NoExecute)"
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
LabelKey = Annotated[str, Field(pattern=f"^{_KEY}$")]
LabelValue = Annotated[str, Field(pattern=f"^{_LABEL}?$")]
Taint = Annotated[str, Field(pattern=f"^{_KEY}(={_LABEL})?:{_EFFECT}$")]
Bytes = Annotated[str, Field(pattern="^[1-9][0-9]{0,5}(Mi|Gi|Ti)$")]
Variable = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
Word = Annotated[str, Field(min_length=1)]


class Kubernetes(BaseModel, extra="forbid", frozen=True):
    """How `orchestrator k8s` runs this on a cluster; training itself reads none of it.

    Attributes:
        name: Of the job and what belongs to it; a DNS label of at most 40 characters.
        namespace: By default kubectl's current one.
        image: Made from k8s/Dockerfile; rendering asks for it.
        image_pull_secret: The Secret for a private registry.
        target: `mpijob` (default), `job` or `trainjob`.
        nodes: Pods with ranks.
        ranks_per_node: Ranks in each.
        gpus_per_node: GPUs of each; 0 by default.
        gpu_resource: What the cluster calls a GPU.
        cpu: Cores of each, such as `4` or `500m`; a request, not a limit.
        memory: Memory of each, such as `8Gi`, with `shm` inside it.
        shm: /dev/shm, part of `memory`.
        scratch: /tmp, on the node's disk, gone with the pod.
        command: Of a rank, instead of `python launch/train.py` with these settings.
        env: Environment variables of the ranks, and of a launcher; none that hold a secret.
        credentials_secret: A Secret whose keys become environment variables.
        service_account: The account that storage knows, for workload identity.
        service_account_annotations: Set where the account is to be made, too.
        volume_claim: A PersistentVolumeClaim that all nodes mount.
        volume_path: Where, `/data` by default; not where the image or the pods have something.
        node_selector: Labels that a node must have.
        tolerations: Taints to put up with, as `key[=value]:Effect`.
        priority_class: The PriorityClass of the pods.
        queue: Kueue's LocalQueue.
        queue_priority: Kueue's WorkloadPriorityClass.
        network_interface: Of the pods, between which the ranks connect: by default `eth0` under an
            operator, and that of the default route in a `job`.
        max_restarts: Starts again after as many failures and, unless it is a `job`, preemptions.
        max_hours: The job is stopped after them; by default never.
        keep_hours: A finished job is removed after them; by default never, as a `trainjob` always.
        drainable: Whether a node with a pod of this may be drained; true by default.
        network_policy: Whether only the job's own pods may connect to it; true by default.
    """

    name: Name = "train"
    namespace: Annotated[str, Field(pattern="^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")] | None = None
    image: Annotated[str, Field(pattern="^[a-z0-9][-A-Za-z0-9_.:/@]*$")] | None = None
    image_pull_secret: Name | None = None
    target: Literal["mpijob", "job", "trainjob"] = "mpijob"
    nodes: int = Field(default=2, ge=1, le=10_000)
    ranks_per_node: int = Field(default=1, ge=1, le=64)
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    gpu_resource: Annotated[str, Field(pattern=f"^{_DOMAIN}{_LABEL}$")] = "nvidia.com/gpu"
    cpu: Annotated[str, Field(pattern="^[1-9][0-9]{0,4}m?$")] = "2"
    memory: Bytes = "8Gi"
    shm: Bytes = "1Gi"
    scratch: Bytes = "4Gi"
    command: Annotated[list[Word], Field(min_length=1)] | None = None
    env: dict[Variable, str] = Field(default_factory=dict)
    credentials_secret: Name | None = None
    service_account: Name | None = None
    service_account_annotations: dict[LabelKey, str] = Field(default_factory=dict)
    volume_claim: Name | None = None
    volume_path: Annotated[str, Field(pattern="^(/[-A-Za-z0-9_]+)+$")] = "/data"
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    tolerations: list[Taint] = Field(default_factory=list)
    priority_class: Name | None = None
    queue: Name | None = None
    queue_priority: Name | None = None
    network_interface: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,15}$")] | None = None
    max_restarts: int = Field(default=10, ge=0, le=10_000)
    max_hours: float | None = Field(default=None, gt=0, le=100_000)
    keep_hours: float | None = Field(default=None, ge=0, le=100_000)
    drainable: bool = True
    network_policy: bool = True
