"""Whether manifests would be taken and could run, without a cluster: schemas, then rules."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from orchestrator.kubernetes import names, object_rules, pod_rules, schemas
from orchestrator.kubernetes.manifests import Object, Place, Problem, at, pods, read

_BATCH = ("Job", "MPIJob", "TrainingRuntime", "ClusterTrainingRuntime")


def validate(paths: Iterable[str | Path]) -> list[Problem]:
    """All that is wrong with the manifests in files and folders.

    Objects in one folder belong together: a selector among them has to find its pods there.

    Raises:
        ImportError: The extra `k8s` is not installed.
    """
    objects, problems = read(paths)
    return problems + check(objects)


def check(objects: list[Object]) -> list[Problem]:
    """The same for objects that have been read."""
    problems = []
    folders = defaultdict(list)
    for one in objects:
        found = list(schemas.problems(one))
        if not found:
            # The rules count on the schema's types.
            found = list(_rules(one))
            folders[str(Path(one.file).parent)].append(one)
        problems += found
    for together in folders.values():
        problems += [*_once(together), *_selectors(together), *_checksums(together)]
    return problems


def _rules(one: Object) -> Iterator[Problem]:
    for rule in object_rules.RULES:
        yield from (one.problem(*finding) for finding in rule(one))
    for pod in pods(one.tree):
        for pod_rule in pod_rules.RULES:
            yield from (one.problem(*finding) for finding in pod_rule(pod))


def _once(objects: list[Object]) -> Iterator[Problem]:
    """No object twice."""
    seen: dict[tuple[str, str, str], Object] = {}
    for one in objects:
        key = (one.tree["apiVersion"], one.label, str(at(one.tree, "metadata").get("namespace")))
        if key in seen:
            rule = f"stands in {seen[key].file} too: the later one would replace it"
            yield one.problem("metadata.name", at(one.tree, "metadata").get("name"), rule)
        seen.setdefault(key, one)


def _selectors(objects: list[Object]) -> Iterator[Problem]:
    """What selects pods finds some; a budget for a job's pods has the one form that works."""
    templates = [(one, pod) for one in objects for pod in pods(one.tree)]
    if not templates:
        return
    for one in objects:
        spec = at(one.tree, "spec")
        path, selector = {
            "Service": ("spec.selector", {"matchLabels": spec.get("selector") or {}}),
            "PodDisruptionBudget": ("spec.selector", spec.get("selector")),
            "NetworkPolicy": ("spec.podSelector", spec.get("podSelector")),
        }.get(one.kind, ("", None))
        if not path or (one.kind == "Service" and not spec.get("selector")):
            continue
        found = [owner for owner, pod in templates if _selects(selector, pod)]
        if not found:
            yield one.problem(path, selector, "matches the labels of no pod here")
        elif one.kind == "PodDisruptionBudget" and found[0].kind in _BATCH:
            yield from _budget(one)


def _selects(selector: object, pod: Place) -> bool:
    return names.matches(selector, at(pod.tree, "metadata", "labels"))


def _budget(one: Object) -> Iterator[Problem]:
    spec = at(one.tree, "spec")
    bound = "maxUnavailable" if "maxUnavailable" in spec else "minAvailable"
    if bound == "maxUnavailable" or not isinstance(spec[bound], int):
        rule = "for a job's pods only minAvailable as a number works: a job has no scale"
        yield one.problem(f"spec.{bound}", spec[bound], rule)


def _checksums(objects: list[Object]) -> Iterator[Problem]:
    """The annotation that starts pods anew with new settings fits the settings."""
    texts = {
        at(one.tree, "metadata").get("name"): at(one.tree, "data").get("settings.yaml")
        for one in objects
        if one.kind == "ConfigMap"
    }
    for one in objects:
        for pod in pods(one.tree):
            given = at(pod.tree, "metadata", "annotations").get("checksum/settings")
            volumes = at(pod.tree, "spec").get("volumes") or []
            mounted = [at(volume, "configMap").get("name") for volume in volumes]
            for text in (texts[name] for name in mounted if texts.get(name) is not None):
                if given and given != hashlib.sha256(str(text).encode()).hexdigest():
                    path = f"{pod.path}metadata.annotations.checksum/settings"
                    rule = "is not of the settings in the ConfigMap: render again"
                    yield one.problem(path, given, rule)
