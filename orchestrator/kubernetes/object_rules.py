"""What an API server or an operator asks of a whole object beyond its schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from orchestrator.kubernetes import names
from orchestrator.kubernetes.checks import secret_value
from orchestrator.kubernetes.manifests import Object, at, items, jobs, pods
from orchestrator.kubernetes.pod_rules import Finding, port

_MAX_CONFIG = 2**20
_DNS_1035 = ("Service", "MPIJob", "TrainJob")
_BATCH = ("Never", "OnFailure")


def name(found: Object) -> Iterator[Finding]:
    """The form of the object's name and namespace, by its kind."""
    meta = at(found.tree, "metadata")
    own = meta.get("name")
    strict = found.kind in _DNS_1035
    form = names.dns_1035_label if strict else names.dns_subdomain
    rule = names.DNS_1035_LABEL if strict else names.DNS_SUBDOMAIN
    if not isinstance(own, str) or not form(own):
        if own is not None or "generateName" not in meta:
            yield "metadata.name", own, f"must be {rule}"
    elif (host := _last_host(found, own)) and not names.dns_1035_label(host):
        yield "metadata.name", own, f"its last pod {host} must be {names.DNS_1035_LABEL}"
    namespace = meta.get("namespace")
    if namespace is not None and not names.dns_1123_label(namespace):
        yield "metadata.namespace", namespace, f"must be {names.DNS_1123_LABEL}"


def _last_host(found: Object, own: str) -> str:
    """The longest name that a pod of the job gets."""
    spec = at(found.tree, "spec")
    if found.kind == "MPIJob":
        return f"{own}-worker-{(at(spec, 'mpiReplicaSpecs', 'Worker').get('replicas') or 1) - 1}"
    if found.kind == "TrainJob":
        return f"{own}-node-0-{(at(spec, 'trainer').get('numNodes') or 1) - 1}"
    if found.kind == "Job" and spec.get("completionMode") == "Indexed":
        return f"{own}-{(spec.get('completions') or 1) - 1}"
    return ""


def labels(found: Object) -> Iterator[Finding]:
    """The object's own labels and annotations."""
    for key, value, rule in names.bad_labels(at(found.tree, "metadata", "labels")):
        yield f"metadata.labels.{key}", value, rule
    for key, value in at(found.tree, "metadata", "annotations").items():
        if not names.label_key(str(key)) or not isinstance(value, str):
            rule = "an annotation is NAME or DOMAIN/NAME, and a text"
            yield f"metadata.annotations.{key}", value, rule


def restart_policy(found: Object) -> Iterator[Finding]:
    """How a job's pods may restart."""
    for job in jobs(found.tree):
        policy = at(job.tree, "template", "spec").get("restartPolicy", "Always")
        path = f"{job.path}template.spec.restartPolicy"
        if policy not in _BATCH:
            yield path, policy, "must be Never or OnFailure in a job"
        elif job.tree.get("podFailurePolicy") and policy != "Never":
            yield path, policy, "must be Never beside a podFailurePolicy"
    for role, replica in at(found.tree, "spec", "mpiReplicaSpecs").items():
        inner = at(replica, "template", "spec").get("restartPolicy")
        if inner is not None and inner != replica.get("restartPolicy"):
            path = f"spec.mpiReplicaSpecs.{role}.template.spec.restartPolicy"
            yield path, inner, "the operator overrides it: set it beside the template"


def indexed_job(found: Object) -> Iterator[Finding]:
    """The numbers of a Job."""
    for job in jobs(found.tree):
        completions, parallelism = job.tree.get("completions"), job.tree.get("parallelism")
        if job.tree.get("completionMode") == "Indexed" and completions is None:
            yield f"{job.path}completions", None, "must be set with completionMode Indexed"
        for key in ("completions", "parallelism", "backoffLimit", "ttlSecondsAfterFinished"):
            value = job.tree.get(key)
            if value is not None and value < 0:
                yield f"{job.path}{key}", value, "must be 0 or more"
        deadline = job.tree.get("activeDeadlineSeconds")
        if deadline is not None and deadline < 1:
            yield f"{job.path}activeDeadlineSeconds", deadline, "must be 1 or more"
        # Fewer at a time than there are ranks' nodes, and the ranks would never meet.
        if completions and parallelism is not None and parallelism > completions:
            yield f"{job.path}parallelism", parallelism, f"is more than completions={completions}"


def failure_policy(found: Object) -> Iterator[Finding]:
    """The rules of a podFailurePolicy."""
    for job in jobs(found.tree):
        policy = at(job.tree, "podFailurePolicy")
        if policy and job.tree.get("podReplacementPolicy") not in (None, "Failed"):
            path = f"{job.path}podReplacementPolicy"
            yield path, job.tree["podReplacementPolicy"], "must be Failed beside podFailurePolicy"
        spec = at(job.tree, "template", "spec")
        known = [
            one.get("name")
            for key in ("containers", "initContainers")
            for _, one in items(spec, key)
        ]
        for index, rule in items(policy, "rules"):
            path = f"{job.path}podFailurePolicy.rules[{index}]"
            codes = at(rule, "onExitCodes")
            if bool(codes) == bool(rule.get("onPodConditions")):
                yield path, rule, "must have one of onExitCodes and onPodConditions"
            if rule.get("action") not in ("Ignore", "FailJob", "FailIndex", "Count"):
                yield (
                    f"{path}.action",
                    rule.get("action"),
                    "must be Ignore, FailJob, FailIndex or Count",
                )
            yield from _exit_codes(f"{path}.onExitCodes", codes, known)


def _exit_codes(path: str, codes: dict[str, Any], known: list[Any]) -> Iterator[Finding]:
    if not codes:
        return
    container, values = codes.get("containerName"), codes.get("values") or []
    if container is not None and container not in known:
        yield f"{path}.containerName", container, f"no container has that name: {known}"
    if values != sorted(set(values)) or not 1 <= len(values) <= 255:
        yield f"{path}.values", values, "must be 1 to 255 exit codes in order, each once"
    elif codes.get("operator") == "In" and 0 in values:
        yield f"{path}.values", values, "0 is no failure: it may not stand with operator In"


def launcher(found: Object) -> Iterator[Finding]:
    """An MPIJob has one launcher, and workers or none."""
    replicas = at(found.tree, "spec", "mpiReplicaSpecs")
    count = at(replicas, "Launcher").get("replicas", 1)
    if count != 1:
        yield "spec.mpiReplicaSpecs.Launcher.replicas", count, "must be 1"
    if "Worker" in replicas and at(replicas, "Worker").get("replicas", 1) < 1:
        workers = at(replicas, "Worker")["replicas"]
        yield "spec.mpiReplicaSpecs.Worker.replicas", workers, "must be 1 or more"


def service(found: Object) -> Iterator[Finding]:
    """The ports of a Service."""
    if found.kind != "Service":
        return
    spec = at(found.tree, "spec")
    named = [one.get("name") for _, one in items(spec, "ports")]
    for index, one in items(spec, "ports"):
        path = f"spec.ports[{index}]"
        yield from port(f"{path}.port", one.get("port"))
        own = one.get("name")
        if len(named) > 1 and (own is None or named.count(own) > 1):
            yield f"{path}.name", own, "several ports need a name each"
        elif own is not None and not names.dns_1123_label(own):
            yield f"{path}.name", own, f"must be {names.DNS_1123_LABEL}"
    if not named and spec.get("clusterIP") != "None" and spec.get("type") != "ExternalName":
        yield "spec.ports", None, "only a headless Service may be without"


def disruption_budget(found: Object) -> Iterator[Finding]:
    """One of the two bounds."""
    spec = at(found.tree, "spec")
    if found.kind == "PodDisruptionBudget" and ("minAvailable" in spec) == (
        "maxUnavailable" in spec
    ):
        yield "spec", spec, "must have one of minAvailable and maxUnavailable"


def config(found: Object) -> Iterator[Finding]:
    """A ConfigMap's size and keys, and no credential in it."""
    if found.kind != "ConfigMap":
        return
    data = at(found.tree, "data")
    size = sum(len(str(key).encode()) + len(str(value).encode()) for key, value in data.items())
    if size > _MAX_CONFIG:
        yield "data", f"{size} bytes", "a ConfigMap holds at most 1 MiB"
    for key, value in data.items():
        if not re.fullmatch(r"[-._A-Za-z0-9]{1,253}", str(key)):
            yield f"data.{key}", value, "a key is at most 253 letters, digits, -, _ and ."
        words = re.split(r"[\s'\",\[\]{}]+", str(value))
        if "PRIVATE KEY-----" in str(value) or any(map(secret_value, words)):
            rule = "holds a credential: use workload identity, or a Secret"
            yield f"data.{key}", "(hidden)", rule


def has_containers(found: Object) -> Iterator[Finding]:
    """A pod has containers."""
    for pod in pods(found.tree):
        if not at(pod.tree, "spec").get("containers"):
            yield f"{pod.path}spec.containers", None, "must have at least one"


RULES = (
    name,
    labels,
    restart_policy,
    indexed_job,
    failure_policy,
    launcher,
    service,
    disruption_budget,
    config,
    has_containers,
)
