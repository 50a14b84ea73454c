"""What fields an object may have: Kubernetes' own kinds by their schemas, ours by these."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.kubernetes.manifests import Object, Problem

Tree = dict[str, Any]

_DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
_META = {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
_POD = {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.api.core.v1.PodTemplateSpec"}
_JOB = {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.api.batch.v1.JobSpec"}
_ENV = {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.api.core.v1.EnvVar"}
_RESOURCES = {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.api.core.v1.ResourceRequirements"}

_TEXT: Tree = {"type": "string"}
_FLAG: Tree = {"type": "boolean"}
_COUNT: Tree = {"type": "integer", "minimum": 0}
_POSITIVE: Tree = {"type": "integer", "minimum": 1}
_MPI: Tree = {"enum": ["OpenMPI", "Intel", "MPICH"]}
_WORDS: Tree = {"type": "array", "items": _TEXT}


def _mapping(required: tuple[str, ...] = (), **properties: Tree) -> Tree:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _kind(version: str, kind: str, spec: Tree) -> Tree:
    return _mapping(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=_META,
        spec=spec,
    )


_REPLICA = _mapping(
    ("replicas", "template"),
    replicas=_COUNT,
    restartPolicy={"enum": ["Never", "OnFailure"]},
    template=_POD,
)
_MPIJOB = _mapping(
    ("mpiReplicaSpecs",),
    slotsPerWorker=_POSITIVE,
    sshAuthMountPath=_TEXT,
    launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
    mpiImplementation=_MPI,
    runLauncherAsWorker=_FLAG,
    mpiReplicaSpecs=_mapping(("Launcher",), Launcher=_REPLICA, Worker=_REPLICA),
    runPolicy=_mapping(
        cleanPodPolicy={"enum": ["None", "Running", "All"]},
        ttlSecondsAfterFinished=_COUNT,
        activeDeadlineSeconds=_POSITIVE,
        backoffLimit=_COUNT,
        suspend=_FLAG,
        managedBy=_TEXT,
        schedulingPolicy=_mapping(
            minAvailable=_COUNT,
            queue=_TEXT,
            minResources={"type": "object"},
            priorityClass=_TEXT,
            scheduleTimeoutSeconds=_COUNT,
        ),
    ),
)
_TRAINJOB = _mapping(
    ("runtimeRef",),
    runtimeRef=_mapping(
        ("name",),
        apiGroup=_TEXT,
        kind={"enum": ["TrainingRuntime", "ClusterTrainingRuntime"]},
        name=_TEXT,
    ),
    trainer=_mapping(
        image=_TEXT,
        command=_WORDS,
        args=_WORDS,
        env={"type": "array", "items": _ENV},
        numNodes=_POSITIVE,
        numProcPerNode=_POSITIVE,
        resourcesPerNode=_RESOURCES,
    ),
    activeDeadlineSeconds=_POSITIVE,
    suspend=_FLAG,
    managedBy=_TEXT,
)
_RUNTIME = _mapping(
    ("template",),
    mlPolicy=_mapping(
        numNodes=_POSITIVE,
        mpi=_mapping(
            numProcPerNode=_POSITIVE,
            mpiImplementation=_MPI,
            sshAuthMountPath=_TEXT,
            runLauncherAsNode=_FLAG,
        ),
    ),
    template=_mapping(
        ("spec",),
        metadata=_META,
        # Of JobSet's spec, what the renderer writes.
        spec=_mapping(
            ("replicatedJobs",),
            network=_mapping(publishNotReadyAddresses=_FLAG, enableDNSHostnames=_FLAG),
            successPolicy=_mapping(
                ("operator",), operator={"enum": ["All", "Any"]}, targetReplicatedJobs=_WORDS
            ),
            failurePolicy=_mapping(maxRestarts=_COUNT),
            replicatedJobs={
                "type": "array",
                "minItems": 1,
                "items": _mapping(
                    ("name", "template"),
                    name=_TEXT,
                    replicas=_COUNT,
                    template=_mapping(("spec",), metadata=_META, spec=_JOB),
                ),
            },
        ),
    ),
)
_TRAINER = "trainer.kubeflow.org/v1alpha1"
_OURS = {
    ("kubeflow.org/v2beta1", "MPIJob"): _MPIJOB,
    (_TRAINER, "TrainJob"): _TRAINJOB,
    (_TRAINER, "TrainingRuntime"): _RUNTIME,
    (_TRAINER, "ClusterTrainingRuntime"): _RUNTIME,
}


def problems(found: Object) -> Iterator[Problem]:
    """Fields that are unknown, missing or of a wrong type.

    Raises:
        ImportError: kubernetes-validate, which holds Kubernetes' schemas, is not installed.
    """
    version, kind = found.tree["apiVersion"], found.kind
    validator = _validator(version, kind)
    if validator is None:
        yield found.problem(
            "apiVersion",
            f"{version} {kind}",
            "no such kind is known here. Built-in kinds, "
            + ", ".join(sorted(f"{v} {k}" for v, k in _OURS)),
        )
        return
    for error in sorted(validator.iter_errors(found.tree), key=lambda e: list(map(str, e.path))):
        path = re.sub(r"\.\[", "[", ".".join(_step(part) for part in error.absolute_path))
        # jsonschema repeats the value in its message; a large one says nothing.
        rule = error.message.removeprefix(f"{error.instance!r} ")
        yield found.problem(path, error.instance, rule)
    if not isinstance(found.tree.get("metadata"), dict):
        yield found.problem("metadata", found.tree.get("metadata"), "is needed, with a name")


def _step(part: str | int) -> str:
    return f"[{part}]" if isinstance(part, int) else part


@functools.cache
def _folder() -> Any:
    try:
        root = importlib.resources.files("kubernetes_validate")
    except ModuleNotFoundError as error:
        raise ImportError(
            "kubernetes-validate is not installed: pip install 'keras-orchestrator[k8s]'"
        ) from error
    from kubernetes_validate import latest_version

    return root / "kubernetes-json-schema" / f"v{latest_version()}-local-strict"


@functools.cache
def _registry() -> Any:
    import referencing

    definitions = json.loads((_folder() / "_definitions.json").read_text(encoding="utf-8"))
    return referencing.Resource.from_contents(definitions) @ referencing.Registry()


@functools.cache
def _validator(version: str, kind: str) -> Any:
    _folder()
    import jsonschema

    schema = _OURS.get((version, kind))
    if schema is not None:
        schema = _kind(version, kind, schema)
    else:
        # The files' names leave the group's domain out: networking.k8s.io/v1 is networking-v1.
        group, slash, name = version.rpartition("/")
        stem = f"{group.partition('.')[0]}-{name}" if slash else version
        file = _folder() / f"{kind.lower()}-{stem}.json"
        if not re.fullmatch(r"[\w.-]+", file.name) or not file.is_file():
            return None
        schema = json.loads(file.read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema, registry=_registry())
