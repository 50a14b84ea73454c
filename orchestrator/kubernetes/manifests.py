"""Manifests as they are read: objects of files, and the pods and jobs inside them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Tree = dict[str, Any]
_SUFFIXES = (".yaml", ".yml")
_SHOWN = 80


class Problem(NamedTuple):
    """What is wrong with a manifest.

    Attributes:
        file: Where it was read.
        path: The object as Kind/name, and the field in it.
        value: What stands there.
        rule: What is allowed, and what to do.
    """

    file: str
    path: str
    value: Any
    rule: str

    def __str__(self) -> str:
        value = repr(self.value)
        if len(value) > _SHOWN:
            value = f"{value[: _SHOWN - 3]}..."
        rule = " ".join(self.rule.split())
        return f"{self.file}: {self.path} = {value}: {rule}"


class Object(NamedTuple):
    """One object of a file."""

    file: str
    tree: Tree

    @property
    def kind(self) -> str:
        """Its kind."""
        return str(self.tree.get("kind"))

    @property
    def label(self) -> str:
        """Its kind and name."""
        return f"{self.kind}/{at(self.tree, 'metadata').get('name', '?')}"

    def problem(self, path: str, value: Any, rule: str) -> Problem:
        """A problem of a field of this object."""
        return Problem(self.file, f"{self.label} {path}".rstrip(), value, rule)


class Place(NamedTuple):
    """Something inside an object: where, and what stands there."""

    path: str
    tree: Tree


def at(tree: Any, *keys: str) -> Tree:
    """A mapping inside a mapping; empty where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def items(tree: Tree, key: str) -> list[tuple[int, Any]]:
    """The elements of a list inside a mapping, numbered; none where there is no list."""
    found = tree.get(key)
    return list(enumerate(found)) if isinstance(found, list) else []


def read(paths: Iterable[str | Path]) -> tuple[list[Object], list[Problem]]:
    """The objects of files and folders, and what could not be read.

    In a folder, and those below it, files without any Kubernetes object are passed over, such as a
    run's settings or a kustomization.
    """
    objects, problems = [], []
    for given in map(Path, paths):
        folder = given.is_dir()
        files = [given]
        if folder:
            files = sorted(path for path in given.rglob("*") if path.suffix in _SUFFIXES)
            if not files:
                problems.append(Problem(str(given), "", None, "holds no .yaml or .yml file"))
        for file in files:
            try:
                trees = [t for t in _load(file) if t is not None]
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                problems.append(Problem(str(file), "", None, f"cannot be read: {error}"))
                continue
            if folder and not any(_is_object(tree) and tree["kind"] != _KUSTOM for tree in trees):
                continue
            for tree in trees:
                if _is_object(tree):
                    objects.append(Object(str(file), tree))
                else:
                    rule = "is no Kubernetes object: it has to have apiVersion, kind and metadata"
                    problems.append(Problem(str(file), "", tree, rule))
            if not trees:
                problems.append(Problem(str(file), "", None, "holds nothing"))
    return objects, problems


_KUSTOM = "Kustomization"


def _is_object(tree: Any) -> bool:
    return isinstance(tree, dict) and all(isinstance(tree.get(k), str) for k in _HEAD)


_HEAD = ("apiVersion", "kind")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, as an API server does, where YAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} stands twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _load(file: Path) -> list[Any]:
    return list(yaml.load_all(file.read_text(encoding="utf-8"), Loader=_Loader))


def pods(tree: Tree) -> Iterator[Place]:
    """The pod templates in an object, of whatever kind; a Pod is its own."""
    kind = tree.get("kind")
    if kind == "Pod":
        yield Place("", tree)
    elif kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"):
        yield Place("spec.template.", at(tree, "spec", "template"))
    elif kind == "MPIJob":
        for role, replica in at(tree, "spec", "mpiReplicaSpecs").items():
            yield Place(f"spec.mpiReplicaSpecs.{role}.template.", at(replica, "template"))
    for job in jobs(tree):
        yield Place(f"{job.path}template.", at(job.tree, "template"))


def jobs(tree: Tree) -> Iterator[Place]:
    """The Job specs in an object."""
    kind = tree.get("kind")
    if kind == "Job":
        yield Place("spec.", at(tree, "spec"))
    elif kind == "CronJob":
        yield Place("spec.jobTemplate.spec.", at(tree, "spec", "jobTemplate", "spec"))
    elif kind in ("TrainingRuntime", "ClusterTrainingRuntime"):
        for index, job in items(at(tree, "spec", "template", "spec"), "replicatedJobs"):
            path = f"spec.template.spec.replicatedJobs[{index}].template.spec."
            yield Place(path, at(job, "template", "spec"))


def containers(pod: Place) -> Iterator[Place]:
    """The containers of a pod template, init containers first."""
    spec = at(pod.tree, "spec")
    for key in ("initContainers", "containers"):
        for index, container in items(spec, key):
            yield Place(f"{pod.path}spec.{key}[{index}].", container)
