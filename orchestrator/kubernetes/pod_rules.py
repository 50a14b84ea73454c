"""What an API server asks of a pod template beyond its schema; one function a rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from orchestrator.kubernetes import names
from orchestrator.kubernetes.checks import secret_name, secret_value
from orchestrator.kubernetes.manifests import Place, at, containers, items

Finding = tuple[str, Any, str]  # path, value, rule
_NATIVE = ("cpu", "memory", "ephemeral-storage")
_PROBES = ("readinessProbe", "livenessProbe", "startupProbe")


def container_names(pod: Place) -> Iterator[Finding]:
    """DNS labels, each once."""
    yield from _unique_labels([(one.path, one.tree.get("name")) for one in containers(pod)])


def volume_names(pod: Place) -> Iterator[Finding]:
    """DNS labels, each once."""
    volumes = items(at(pod.tree, "spec"), "volumes")
    path = f"{pod.path}spec.volumes"
    yield from _unique_labels([(f"{path}[{i}].", one.get("name")) for i, one in volumes])


def _unique_labels(found: list[tuple[str, Any]]) -> Iterator[Finding]:
    counts = Counter(name for _, name in found)
    for path, name in found:
        if not isinstance(name, str) or not names.dns_1123_label(name):
            yield f"{path}name", name, f"must be {names.DNS_1123_LABEL}"
        elif counts[name] > 1:
            yield f"{path}name", name, f"stands {counts[name]} times: each name once"


def mounts(pod: Place) -> Iterator[Finding]:
    """Mounted volumes exist, and no two at one place."""
    volumes = [one.get("name") for _, one in items(at(pod.tree, "spec"), "volumes")]
    for container in containers(pod):
        found = items(container.tree, "volumeMounts")
        places = Counter(one.get("mountPath") for _, one in found)
        for index, one in found:
            path = f"{container.path}volumeMounts[{index}]"
            name, place = one.get("name"), str(one.get("mountPath"))
            if name not in volumes:
                known = ", ".join(map(str, volumes)) or "none"
                yield f"{path}.name", name, f"no volume of this pod has that name: {known}"
            if not place.startswith("/") or ":" in place:
                yield f"{path}.mountPath", place, "must be an absolute path without a colon"
            elif places[one.get("mountPath")] > 1:
                yield f"{path}.mountPath", place, "something is mounted there already"


def ports(pod: Place) -> Iterator[Finding]:
    """Numbers that exist, names of the right form, probes that name a port of theirs."""
    for container in containers(pod):
        found = items(container.tree, "ports")
        known = [one.get("name") for _, one in found]
        for index, one in found:
            path = f"{container.path}ports[{index}]"
            yield from port(f"{path}.containerPort", one.get("containerPort"))
            name = one.get("name")
            if name is not None and (not names.port_name(name) or known.count(name) > 1):
                rule = "must be at most 15 of a-z, 0-9 and -, with a letter, and once a container"
                yield f"{path}.name", name, rule
        for probe in _PROBES:
            for handler in ("tcpSocket", "httpGet"):
                asked = at(container.tree, probe, handler).get("port")
                path = f"{container.path}{probe}.{handler}.port"
                if isinstance(asked, str) and asked not in known:
                    yield path, asked, "no port of this container has that name"
                elif isinstance(asked, int):
                    yield from port(path, asked)


def port(path: str, number: Any) -> Iterator[Finding]:
    """A port's number."""
    if not isinstance(number, int) or not 1 <= number <= 65535:
        yield path, number, "a port is a number from 1 to 65535"


def quantities(pod: Place) -> Iterator[Finding]:
    """Requests and limits are quantities of known resources, and not below 0."""
    for container in containers(pod):
        for part in ("requests", "limits"):
            for name, value in at(container.tree, "resources", part).items():
                path = f"{container.path}resources.{part}.{name}"
                yield from _quantity(path, value)
                native = name in _NATIVE or name.startswith("hugepages-")
                if not native and not ("/" in name and names.label_key(name)):
                    rule = f"no such resource: {', '.join(_NATIVE)}, or DOMAIN/NAME"
                    yield path, value, rule
    for index, volume in items(at(pod.tree, "spec"), "volumes"):
        limit = at(volume, "emptyDir").get("sizeLimit")
        if limit is not None:
            yield from _quantity(f"{pod.path}spec.volumes[{index}].emptyDir.sizeLimit", limit)


def _quantity(path: str, value: Any) -> Iterator[Finding]:
    number = names.quantity(value)
    if number is None or number < 0:
        yield path, value, "must be a quantity such as 500m, 2, 8Gi or 1e9, and not below 0"


def limits(pod: Place) -> Iterator[Finding]:
    """No request above its limit; GPUs and other devices whole, request = limit."""
    for container in containers(pod):
        asked = at(container.tree, "resources", "requests")
        allowed = at(container.tree, "resources", "limits")
        for name in dict.fromkeys([*asked, *allowed]):
            path = f"{container.path}resources.requests.{name}"
            request, limit = (names.quantity(part.get(name)) for part in (asked, allowed))
            device = "/" in name and not name.partition("/")[0].endswith("kubernetes.io")
            if device:
                if limit is None or (request is not None and request != limit):
                    rule = f"limits.{name} is {allowed.get(name)!r}: a device's request and limit"
                    yield path, asked.get(name), f"{rule} must be equal"
                elif limit != int(limit):
                    yield path.replace("requests", "limits"), allowed[name], "must be whole"
            elif request is not None and limit is not None and request > limit:
                yield path, asked[name], f"is more than limits.{name}={allowed[name]}"


def memory_volumes(pod: Place) -> Iterator[Finding]:
    """A volume in memory takes from the containers' memory and must leave some."""
    found = [at(one.tree, "resources", "limits").get("memory") for one in containers(pod)]
    memory = max((q for q in map(names.quantity, found) if q is not None), default=None)
    for index, volume in items(at(pod.tree, "spec"), "volumes"):
        empty = at(volume, "emptyDir")
        size = names.quantity(empty.get("sizeLimit"))
        if empty.get("medium") != "Memory" or memory is None:
            continue
        if (size if size is not None else Decimal("Infinity")) >= memory:
            path = f"{pod.path}spec.volumes[{index}].emptyDir.sizeLimit"
            rule = "is not below the memory limit, which what is written there counts against"
            yield path, empty.get("sizeLimit"), rule


def environment(pod: Place) -> Iterator[Finding]:
    """Names that can be, one source each."""
    for container in containers(pod):
        for index, one in items(container.tree, "env"):
            path, name = f"{container.path}env[{index}]", one.get("name")
            if not re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", str(name)):
                yield f"{path}.name", name, "must be letters, digits, -, _ and ., no digit first"
            if one.get("value") and one.get("valueFrom"):
                yield f"{path}.valueFrom", one["valueFrom"], "value is set too: one of the two"


def credentials(pod: Place) -> Iterator[Finding]:
    """No credential in an environment's plain values or in arguments."""
    rule = "holds a credential: use workload identity, or a Secret by envFrom or valueFrom"
    for container in containers(pod):
        for index, one in items(container.tree, "env"):
            value = one.get("value")
            if value and (secret_name(str(one.get("name"))) or secret_value(str(value))):
                yield f"{container.path}env[{index}].value", "(hidden)", f"{one['name']} {rule}"
        for key in ("command", "args"):
            for index, word in items(container.tree, key):
                if secret_value(str(word).partition("=")[2] or str(word)):
                    yield f"{container.path}{key}[{index}]", "(hidden)", rule


def placement(pod: Place) -> Iterator[Finding]:
    """Labels, tolerations and spread constraints that a scheduler can follow."""
    own = at(pod.tree, "metadata", "labels")
    spec = at(pod.tree, "spec")
    for part, labels in (
        ("metadata.labels", own),
        ("spec.nodeSelector", at(spec, "nodeSelector")),
    ):
        for key, value, rule in names.bad_labels(labels):
            yield f"{pod.path}{part}.{key}", value, rule
    for index, one in items(spec, "tolerations"):
        path = f"{pod.path}spec.tolerations[{index}]"
        if one.get("operator") == "Exists" and one.get("value"):
            yield f"{path}.value", one["value"], "operator Exists takes no value"
        if one.get("effect") not in (None, "", "NoSchedule", "PreferNoSchedule", "NoExecute"):
            rule = "must be NoSchedule, PreferNoSchedule or NoExecute"
            yield f"{path}.effect", one["effect"], rule
    for index, one in items(spec, "topologySpreadConstraints"):
        path, selector = f"{pod.path}spec.topologySpreadConstraints[{index}]", "labelSelector"
        if (one.get("maxSkew") or 0) < 1:
            yield f"{path}.maxSkew", one.get("maxSkew"), "must be 1 or more"
        if one.get("whenUnsatisfiable") not in ("DoNotSchedule", "ScheduleAnyway"):
            rule = "must be DoNotSchedule or ScheduleAnyway"
            yield f"{path}.whenUnsatisfiable", one.get("whenUnsatisfiable"), rule
        if not names.matches(one.get(selector), own):
            yield f"{path}.{selector}", one.get(selector), "does not match this pod's own labels"


def times(pod: Place) -> Iterator[Finding]:
    """The grace period."""
    grace = at(pod.tree, "spec").get("terminationGracePeriodSeconds")
    if grace is not None and grace < 0:
        yield f"{pod.path}spec.terminationGracePeriodSeconds", grace, "must be 0 or more"


RULES = (
    container_names,
    volume_names,
    mounts,
    ports,
    quantities,
    limits,
    memory_volumes,
    environment,
    credentials,
    placement,
    times,
)
