"""Settings and manifests that the tests change one thing of, and settings of any kind."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from orchestrator.config import Settings
from orchestrator.kubernetes.manifests import Object
from orchestrator.kubernetes.render import render
from orchestrator.kubernetes.validate import check

ROOT = Path(__file__).parents[2]
TARGETS = ("mpijob", "job", "trainjob")
IMAGE = "registry.example/orchestrator@sha256:" + 64 * "0"
GOOD: dict[str, Any] = {
    "run": {"dir": "s3://bucket/run"},
    "train": {"epochs": 3, "global_batch_size": 8},
    "data": {"factory": "pkg.mod:data"},
    "model": {"factory": "pkg.mod:model"},
    "kubernetes": {"name": "train", "image": IMAGE, "gpus_per_node": 2},
}


def settings(**sections: dict[str, Any]) -> Settings:
    """Good settings with some changed: `settings(kubernetes={"nodes": 3})`."""
    tree = copy.deepcopy(GOOD)
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return Settings.model_validate(tree)


def rendered(target: str, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Manifests by kind."""
    return {one["kind"]: one for one in render(settings(**sections), target)}


@functools.cache
def _good(target: str) -> dict[str, dict[str, Any]]:
    return rendered(target)


def good(target: str) -> dict[str, dict[str, Any]]:
    """Good manifests by kind, to be spoilt."""
    return copy.deepcopy(_good(target))


def problems(manifests: list[dict[str, Any]]) -> list[str]:
    """What the validator says about manifests that stand in one file."""
    return [str(one) for one in check([Object("file.yaml", tree) for tree in manifests])]


def pod_of(manifest: dict[str, Any], role: str = "Worker") -> dict[str, Any]:
    """The pod template of a Job, or of a role of an MPIJob."""
    if manifest["kind"] == "MPIJob":
        return manifest["spec"]["mpiReplicaSpecs"][role]["template"]
    return manifest["spec"]["template"]


def all_pods(manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The pod templates of manifests by kind."""
    found = []
    for one in manifests.values():
        if one["kind"] == "MPIJob":
            found += [replica["template"] for replica in one["spec"]["mpiReplicaSpecs"].values()]
        elif one["kind"] == "Job":
            found.append(one["spec"]["template"])
        elif one["kind"] == "TrainingRuntime":
            jobs = one["spec"]["template"]["spec"]["replicatedJobs"]
            found += [job["template"]["spec"]["template"] for job in jobs]
    return found


# -- any settings ------------------------------------------------------------------------------

_DNS = st.from_regex(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True)
_LABEL = st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", fullmatch=True)
_DOMAIN = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?(\.[a-z]{2,5})?", fullmatch=True)
_KEY = st.one_of(_LABEL, st.builds("{}/{}".format, _DOMAIN, _LABEL))
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
_SIZE = st.builds("{}{}".format, st.integers(1, 999_999), st.sampled_from(["Mi", "Gi", "Ti"]))
_TAINT = st.builds(
    "{}{}:{}".format,
    _KEY,
    st.one_of(st.just(""), st.builds("={}".format, _LABEL)),
    st.sampled_from(["NoSchedule", "PreferNoSchedule", "NoExecute"]),
)
KUBERNETES = st.fixed_dictionaries(
    {"image": st.just(IMAGE), "target": st.sampled_from(TARGETS)},
    optional={
        "name": _DNS,
        "namespace": _DNS,
        "image_pull_secret": _DNS,
        "nodes": st.integers(1, 10_000),
        "ranks_per_node": st.integers(1, 64),
        "gpus_per_node": st.integers(0, 64),
        "gpu_resource": st.sampled_from(["nvidia.com/gpu", "amd.com/gpu", "x/mig-1g.5gb"]),
        "cpu": st.builds("{}{}".format, st.integers(1, 99_999), st.sampled_from(["", "m"])),
        "memory": _SIZE,
        "shm": _SIZE,
        "scratch": _SIZE,
        "command": st.lists(_TEXT.filter(bool), min_size=1, max_size=4),
        "env": st.dictionaries(
            st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True), _TEXT, max_size=3
        ),
        "credentials_secret": _DNS,
        "service_account": _DNS,
        "service_account_annotations": st.dictionaries(_KEY, _TEXT, max_size=2),
        "volume_claim": _DNS,
        "volume_path": st.one_of(
            st.from_regex(r"(/[-A-Za-z0-9_]{1,9}){1,3}", fullmatch=True),
            st.sampled_from(["/data", "/dev/shm"]),
        ),
        "node_selector": st.dictionaries(_KEY, st.one_of(st.just(""), _LABEL), max_size=3),
        "tolerations": st.lists(_TAINT, max_size=3),
        "priority_class": _DNS,
        "queue": _DNS,
        "queue_priority": _DNS,
        "network_interface": st.sampled_from(["eth0", "net1"]),
        "max_restarts": st.integers(0, 10_000),
        "max_hours": st.floats(0.001, 100_000),
        "keep_hours": st.floats(0, 100_000),
        "drainable": st.booleans(),
        "network_policy": st.booleans(),
    },
)


def _repaired(tree: dict[str, Any]) -> dict[str, Any]:
    """What most of these would be refused for, set right: else few are rendered."""
    tree = {**tree, "memory": "999999Ti"}
    if tree.get("shm") == tree["memory"]:
        del tree["shm"]
    if "service_account_annotations" in tree:
        tree.setdefault("service_account", "account")
    if "queue_priority" in tree:
        tree.setdefault("queue", "queue")
    tree["ranks_per_node"] = max(1, tree.get("gpus_per_node", 0))
    return tree


ANY_KUBERNETES = st.one_of(KUBERNETES, KUBERNETES.map(_repaired), KUBERNETES.map(_repaired))
RUN = st.fixed_dictionaries(
    {
        "dir": st.one_of(
            st.builds("s3://{}/{}".format, _DNS, _DNS),
            st.builds("/tmp/{}".format, _DNS),
            st.builds("gs://{}/{}".format, _DNS, _TEXT),
        )
    },
    optional={
        "backend": st.sampled_from(["auto", "horovod", "auto", "horovod", "mpi", "mirrored"]),
        "seed": st.integers(0, 2**31 - 1),
        "preempt_grace": st.floats(0.1, 100_000),
    },
)
_LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), _TEXT)
OPTIONS = st.dictionaries(_TEXT, st.recursive(_LEAF, st.lists, max_leaves=4), max_size=3)
