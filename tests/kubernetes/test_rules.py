"""Each rule of the validator: a good manifest with one thing spoilt trips it, and it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from . import cases

Manifests = dict[str, dict[str, Any]]


class Bad(NamedTuple):
    """A spoilt manifest: what is spoilt, and where and what the validator says of it."""

    name: str
    target: str
    spoil: Callable[[Manifests], Any]
    path: str
    value: str
    rule: str


def worker(m: Manifests) -> dict[str, Any]:
    return cases.pod_of(m["MPIJob"])["spec"]


def container(m: Manifests) -> dict[str, Any]:
    return worker(m)["containers"][0]


def job(m: Manifests) -> dict[str, Any]:
    return m["Job"]["spec"]


def policy(m: Manifests, index: int) -> dict[str, Any]:
    return job(m)["podFailurePolicy"]["rules"][index]


def replicas(m: Manifests, role: str) -> dict[str, Any]:
    return m["MPIJob"]["spec"]["mpiReplicaSpecs"][role]


W = "MPIJob/train spec.mpiReplicaSpecs.Worker.template.spec"
C = f"{W}.containers[0]"
J = "Job/train spec"
CASES = [
    # Schemas
    Bad("an unknown field", "mpijob", lambda m: m["MPIJob"]["spec"].update(elasticPolicy={}),
        "MPIJob/train spec", "{", "'elasticPolicy' was unexpected"),
    Bad("an unknown field of a pod", "mpijob", lambda m: worker(m).update(hostNetwrok=True),
        W, "{", "'hostNetwrok' was unexpected"),
    Bad("an unknown field of a Job", "job", lambda m: job(m).update(retries=3),
        J, "{", "'retries' was unexpected"),
    Bad("a wrong type", "job", lambda m: job(m).update(completions="2"),
        f"{J}.completions", "'2'", "is not of type"),
    Bad("a number for a variable", "job",
        lambda m: job(m)["template"]["spec"]["containers"][0]["env"].append(
            {"name": "N", "value": 1}),
        f"{J}.template.spec.containers[0].env[2].value", "1", "is not of type"),
    Bad("an unknown choice", "mpijob",
        lambda m: m["MPIJob"]["spec"].update(mpiImplementation="Gloo"),
        "MPIJob/train spec.mpiImplementation", "'Gloo'", "is not one of"),
    Bad("a missing field", "trainjob", lambda m: m["TrainJob"]["spec"].pop("runtimeRef"),
        "TrainJob/train spec", "{", "'runtimeRef' is a required property"),
    Bad("an unknown kind", "job", lambda m: m["Job"].update(kind="Jobs"),
        "Jobs/train apiVersion", "'batch/v1 Jobs'", "no such kind"),
    Bad("Always for a replica", "mpijob",
        lambda m: replicas(m, "Worker").update(restartPolicy="Always"),
        "MPIJob/train spec.mpiReplicaSpecs.Worker.restartPolicy", "'Always'", "is not one of"),
    # Quantities and devices
    Bad("no quantity", "mpijob",
        lambda m: container(m)["resources"]["requests"].update(memory="8 GB"),
        f"{C}.resources.requests.memory", "'8 GB'", "must be a quantity"),
    Bad("a negative quantity", "mpijob",
        lambda m: container(m)["resources"]["requests"].update(cpu="-1"),
        f"{C}.resources.requests.cpu", "'-1'", "must be a quantity"),
    Bad("no quantity for a volume", "mpijob",
        lambda m: worker(m)["volumes"][0]["emptyDir"].update(sizeLimit="4GB"),
        f"{W}.volumes[0].emptyDir.sizeLimit", "'4GB'", "must be a quantity"),
    Bad("an unknown resource", "mpijob",
        lambda m: container(m)["resources"]["requests"].update(gpu="1"),
        f"{C}.resources.requests.gpu", "'1'", "no such resource"),
    Bad("a GPU request unlike its limit", "mpijob",
        lambda m: container(m)["resources"]["requests"].update({"nvidia.com/gpu": 1}),
        f"{C}.resources.requests.nvidia.com/gpu", "1", "limits.nvidia.com/gpu is 2"),
    Bad("a GPU without a limit", "mpijob",
        lambda m: container(m)["resources"]["limits"].pop("nvidia.com/gpu"),
        f"{C}.resources.requests.nvidia.com/gpu", "2", "must be equal"),
    Bad("half a GPU", "mpijob",
        lambda m: [container(m)["resources"][k].update({"nvidia.com/gpu": "500m"})
                   for k in ("requests", "limits")],
        f"{C}.resources.limits.nvidia.com/gpu", "'500m'", "must be whole"),
    Bad("a request over its limit", "mpijob",
        lambda m: container(m)["resources"]["requests"].update(memory="9Gi"),
        f"{C}.resources.requests.memory", "'9Gi'", "more than limits.memory=8Gi"),
    Bad("all memory for /dev/shm", "mpijob",
        lambda m: worker(m)["volumes"][1]["emptyDir"].update(sizeLimit="8Gi"),
        f"{W}.volumes[1].emptyDir.sizeLimit", "'8Gi'", "memory limit"),
    Bad("/dev/shm without a limit", "mpijob",
        lambda m: worker(m)["volumes"][1]["emptyDir"].pop("sizeLimit"),
        f"{W}.volumes[1].emptyDir.sizeLimit", "None", "memory limit"),
    # Restart policies
    Bad("podFailurePolicy with OnFailure", "job",
        lambda m: job(m)["template"]["spec"].update(restartPolicy="OnFailure"),
        f"{J}.template.spec.restartPolicy", "'OnFailure'", "must be Never"),
    Bad("Always in a Job", "job",
        lambda m: job(m)["template"]["spec"].update(restartPolicy="Always"),
        f"{J}.template.spec.restartPolicy", "'Always'", "must be Never or OnFailure"),
    Bad("no policy in a Job", "job", lambda m: job(m)["template"]["spec"].pop("restartPolicy"),
        f"{J}.template.spec.restartPolicy", "'Always'", "must be Never or OnFailure"),
    Bad("a policy the operator overrides", "mpijob",
        lambda m: worker(m).update(restartPolicy="Always"),
        f"{W}.restartPolicy", "'Always'", "overrides"),
    Bad("the runtime's launcher", "trainjob",
        lambda m: m["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0][
            "template"]["spec"]["template"]["spec"].update(restartPolicy="OnFailure"),
        "TrainingRuntime/train spec.template.spec.replicatedJobs[0].template.spec.template.spec"
        ".restartPolicy", "'OnFailure'", "must be Never"),
    # podFailurePolicy and the numbers of a Job
    Bad("a container that is not there", "job",
        lambda m: policy(m, 1)["onExitCodes"].update(containerName="main"),
        f"{J}.podFailurePolicy.rules[1].onExitCodes.containerName", "'main'", "no container"),
    Bad("0 as a failure", "job", lambda m: policy(m, 1)["onExitCodes"].update(values=[0, 75]),
        f"{J}.podFailurePolicy.rules[1].onExitCodes.values", "[0, 75]", "0 is no failure"),
    Bad("codes out of order", "job",
        lambda m: policy(m, 1)["onExitCodes"].update(values=[75, 3]),
        f"{J}.podFailurePolicy.rules[1].onExitCodes.values", "[75, 3]", "in order"),
    Bad("a rule of both forms", "job",
        lambda m: policy(m, 1).update(onPodConditions=[{"type": "X", "status": "True"}]),
        f"{J}.podFailurePolicy.rules[1]", "{", "one of onExitCodes and onPodConditions"),
    Bad("an unknown action", "job", lambda m: policy(m, 0).update(action="Retry"),
        f"{J}.podFailurePolicy.rules[0].action", "'Retry'", "Ignore"),
    Bad("replacing pods that still end", "job",
        lambda m: job(m).update(podReplacementPolicy="TerminatingOrFailed"),
        f"{J}.podReplacementPolicy", "'TerminatingOrFailed'", "must be Failed"),
    Bad("Indexed without a number", "job", lambda m: job(m).pop("completions"),
        f"{J}.completions", "None", "completionMode Indexed"),
    Bad("more at a time than in all", "job", lambda m: job(m).update(parallelism=3),
        f"{J}.parallelism", "3", "completions=2"),
    Bad("a negative limit", "job", lambda m: job(m).update(backoffLimit=-1),
        f"{J}.backoffLimit", "-1", "0 or more"),
    Bad("no time at all", "job", lambda m: job(m).update(activeDeadlineSeconds=0),
        f"{J}.activeDeadlineSeconds", "0", "1 or more"),
    Bad("two launchers", "mpijob", lambda m: replicas(m, "Launcher").update(replicas=2),
        "MPIJob/train spec.mpiReplicaSpecs.Launcher.replicas", "2", "must be 1"),
    Bad("no workers", "mpijob", lambda m: replicas(m, "Worker").update(replicas=0),
        "MPIJob/train spec.mpiReplicaSpecs.Worker.replicas", "0", "1 or more"),
    # Names
    Bad("an upper-case name", "mpijob", lambda m: m["MPIJob"]["metadata"].update(name="Train"),
        "MPIJob/Train metadata.name", "'Train'", "DNS-1035"),
    Bad("a digit first", "job", lambda m: m["Service"]["metadata"].update(name="1train"),
        "Service/1train metadata.name", "'1train'", "DNS-1035"),
    Bad("no room for the worker's index", "mpijob",
        lambda m: m["MPIJob"]["metadata"].update(name=55 * "a"),
        f"MPIJob/{55 * 'a'} metadata.name", f"'{55 * 'a'}'", f"{55 * 'a'}-worker-1 must be"),
    Bad("no room for the index", "job",
        lambda m: m["Job"]["metadata"].update(name=62 * "a"),
        f"Job/{62 * 'a'} metadata.name", f"'{62 * 'a'}'", f"{62 * 'a'}-1 must be"),
    Bad("an upper-case ConfigMap", "job",
        lambda m: m["ConfigMap"]["metadata"].update(name="Settings"),
        "ConfigMap/Settings metadata.name", "'Settings'", "DNS name"),
    Bad("no name", "job", lambda m: m["PodDisruptionBudget"]["metadata"].pop("name"),
        "PodDisruptionBudget/? metadata.name", "None", "DNS name"),
    Bad("a bad namespace", "job", lambda m: m["Job"]["metadata"].update(namespace="my_team"),
        "Job/train metadata.namespace", "'my_team'", "DNS label"),
    Bad("a container's name", "mpijob", lambda m: container(m).update(name="my_worker"),
        f"{C}.name", "'my_worker'", "DNS label"),
    Bad("a label's value", "job",
        lambda m: m["Job"]["metadata"]["labels"].update(run="s3://a"),
        "Job/train metadata.labels.run", "'s3://a'", "label's value"),
    Bad("a label's key", "job", lambda m: m["Job"]["metadata"]["labels"].update({"a b": "c"}),
        "Job/train metadata.labels.a b", "'c'", "label's key"),
    Bad("an annotation's key", "job",
        lambda m: m["Job"]["metadata"].update(annotations={"a b": "c"}),
        "Job/train metadata.annotations.a b", "'c'", "annotation"),
    # Ports, volumes, environment
    Bad("a port that does not exist", "mpijob",
        lambda m: container(m)["ports"][0].update(containerPort=70000),
        f"{C}.ports[0].containerPort", "70000", "1 to 65535"),
    Bad("a long port name", "mpijob",
        lambda m: container(m)["ports"].append({"name": 16 * "a", "containerPort": 1}),
        f"{C}.ports[1].name", f"'{16 * 'a'}'", "at most 15"),
    Bad("a probe of no port", "mpijob",
        lambda m: container(m)["readinessProbe"]["tcpSocket"].update(port="sshd"),
        f"{C}.readinessProbe.tcpSocket.port", "'sshd'", "no port"),
    Bad("a Service's port", "job", lambda m: m["Service"]["spec"]["ports"][0].update(port=0),
        "Service/train spec.ports[0].port", "0", "1 to 65535"),
    Bad("two ports without names", "job",
        lambda m: m["Service"]["spec"]["ports"].append({"port": 80}),
        "Service/train spec.ports[1].name", "None", "name each"),
    Bad("a Service without ports", "job",
        lambda m: (m["Service"]["spec"].pop("ports"), m["Service"]["spec"].pop("clusterIP")),
        "Service/train spec.ports", "None", "headless"),
    Bad("a volume that is not there", "mpijob",
        lambda m: container(m)["volumeMounts"][1].update(name="shmem"),
        f"{C}.volumeMounts[1].name", "'shmem'", "no volume of this pod"),
    Bad("a relative mount", "mpijob",
        lambda m: container(m)["volumeMounts"][1].update(mountPath="shm"),
        f"{C}.volumeMounts[1].mountPath", "'shm'", "absolute"),
    Bad("a variable's name", "mpijob",
        lambda m: container(m)["env"].append({"name": "A B", "value": "1"}),
        f"{C}.env[2].name", "'A B'", "no digit first"),
    Bad("two sources", "mpijob",
        lambda m: container(m)["env"].append(
            {"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}),
        f"{C}.env[2].valueFrom", "{", "one of the two"),
    # Placement
    Bad("Exists with a value", "mpijob",
        lambda m: worker(m).update(
            tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
        f"{W}.tolerations[0].value", "'b'", "takes no value"),
    Bad("an unknown effect", "mpijob",
        lambda m: worker(m).update(tolerations=[{"key": "a", "effect": "Never"}]),
        f"{W}.tolerations[0].effect", "'Never'", "NoSchedule"),
    Bad("a node's label", "mpijob", lambda m: worker(m).update(nodeSelector={"a": "b c"}),
        f"{W}.nodeSelector.a", "'b c'", "label's value"),
    Bad("spread over others' pods", "mpijob",
        lambda m: worker(m)["topologySpreadConstraints"][0]["labelSelector"].update(
            matchLabels={"app": "other"}),
        f"{W}.topologySpreadConstraints[0].labelSelector", "{", "own labels"),
    Bad("a skew of 0", "mpijob",
        lambda m: worker(m)["topologySpreadConstraints"][0].update(maxSkew=0),
        f"{W}.topologySpreadConstraints[0].maxSkew", "0", "1 or more"),
    Bad("no way to spread", "mpijob",
        lambda m: worker(m)["topologySpreadConstraints"][0].update(whenUnsatisfiable="Ignore"),
        f"{W}.topologySpreadConstraints[0].whenUnsatisfiable", "'Ignore'", "ScheduleAnyway"),
    Bad("a negative grace", "mpijob",
        lambda m: worker(m).update(terminationGracePeriodSeconds=-1),
        f"{W}.terminationGracePeriodSeconds", "-1", "0 or more"),
    # Credentials
    Bad("a secret variable", "mpijob",
        lambda m: container(m)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        f"{C}.env[2].value", "'(hidden)'", "holds a credential"),
    Bad("a secret argument", "mpijob",
        lambda m: container(m)["command"].append("--store=s3://me:pass@host/b"),
        f"{C}.command[4]", "'(hidden)'", "holds a credential"),
    Bad("a secret in a ConfigMap", "mpijob",
        lambda m: m["ConfigMap"]["data"].update(key="id: AKIAABCDEFGHIJKLMNOP"),
        "ConfigMap/train-settings data.key", "'(hidden)'", "holds a credential"),
    Bad("a key in a ConfigMap", "mpijob",
        lambda m: m["ConfigMap"]["data"].update(key="-----BEGIN RSA PRIVATE KEY-----\nMII"),
        "ConfigMap/train-settings data.key", "'(hidden)'", "holds a credential"),
    Bad("a large ConfigMap", "mpijob",
        lambda m: m["ConfigMap"]["data"].update(big=2**20 * "x"),
        "ConfigMap/train-settings data", "bytes", "1 MiB"),
    Bad("a ConfigMap's key", "mpijob", lambda m: m["ConfigMap"]["data"].update({"a/b": "x"}),
        "ConfigMap/train-settings data.a/b", "'x'", "a key is"),
    # Between objects
    Bad("a Service of no pods", "job",
        lambda m: m["Service"]["spec"]["selector"].update(app="other"),
        "Service/train spec.selector", "{", "no pod here"),
    Bad("a policy for no pods", "mpijob",
        lambda m: m["NetworkPolicy"]["spec"].update(podSelector={"matchLabels": {"a": "b"}}),
        "NetworkPolicy/train spec.podSelector", "{", "no pod here"),
    Bad("a budget of no pods", "mpijob",
        lambda m: m["PodDisruptionBudget"]["spec"].update(
            selector={"matchExpressions": [{"key": "x", "operator": "Exists"}]}),
        "PodDisruptionBudget/train spec.selector", "{", "no pod here"),
    Bad("a share of a job's pods", "mpijob",
        lambda m: m["PodDisruptionBudget"]["spec"].update(minAvailable="50%"),
        "PodDisruptionBudget/train spec.minAvailable", "'50%'", "as a number"),
    Bad("maxUnavailable of a job's pods", "job",
        lambda m: m["PodDisruptionBudget"].update(
            spec={"maxUnavailable": 1, "selector": m["PodDisruptionBudget"]["spec"]["selector"]}),
        "PodDisruptionBudget/train spec.maxUnavailable", "1", "only minAvailable"),
    Bad("other settings than the checksum's", "job",
        lambda m: m["ConfigMap"]["data"].update({"settings.yaml": "run: {}"}),
        f"{J}.template.metadata.annotations.checksum/settings", "'", "render again"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trips_exactly_its_rule(case):
    manifests = cases.good(case.target)
    case.spoil(manifests)
    (line,) = cases.problems(list(manifests.values()))
    file, _, rest = line.partition(": ")
    path, _, rest = rest.partition(" = ")
    value, _, rule = rest.partition(": ")
    assert file == "file.yaml"
    assert path == case.path
    assert value.startswith(case.value) or case.value in value
    assert case.rule in f"{value}: {rule}"
    assert "\n" not in line


@pytest.mark.parametrize("target", ["mpijob", "job", "trainjob"])
def test_nothing_is_wrong_with_the_good_ones(target):
    assert cases.problems(list(cases.good(target).values())) == []


def test_names_that_stand_twice():
    manifests = cases.good("mpijob")
    spec = worker(manifests)
    spec["volumes"].append({"name": "scratch", "emptyDir": {}})
    spec["containers"].append({**container(manifests), "name": "worker"})
    spec["containers"][0]["volumeMounts"].append({"name": "shm", "mountPath": "/tmp"})
    found = cases.problems(list(manifests.values()))
    assert [line.split(" = ")[0].rpartition("spec.")[2] for line in found] == [
        "containers[0].name",
        "containers[1].name",
        "volumes[0].name",
        "volumes[3].name",
        "containers[0].volumeMounts[0].mountPath",
        "containers[0].volumeMounts[3].mountPath",
        "containers[1].volumeMounts[0].mountPath",
        "containers[1].volumeMounts[3].mountPath",
    ]


def test_budgets_with_both_bounds_or_none():
    manifests = cases.good("job")
    manifests["PodDisruptionBudget"]["spec"]["maxUnavailable"] = 1
    found = cases.problems(list(manifests.values()))
    assert any("one of minAvailable and maxUnavailable" in line for line in found)


def test_an_object_twice():
    manifests = list(cases.good("job").values())
    (line,) = cases.problems([*manifests, manifests[-1]])
    assert line.startswith("file.yaml: Job/train metadata.name = 'train': stands in file.yaml too")
