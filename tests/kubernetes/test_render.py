"""What stands in the manifests."""

from __future__ import annotations

import hashlib

import pytest
import yaml

from orchestrator.kubernetes.render import as_yaml, render

from . import cases
from .cases import TARGETS, all_pods, pod_of, rendered, settings
from .kubelet import environment, expanded


@pytest.mark.parametrize("target", TARGETS)
def test_every_pod_is_of_the_restricted_kind(target):
    pods = all_pods(rendered(target))
    assert len(pods) == (1 if target == "job" else 2)
    for pod in pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"name": "scratch", "mountPath": "/tmp"} in container["volumeMounts"]
        ports = [port["containerPort"] for port in container.get("ports", [])]
        assert all(port > 1024 for port in ports)


@pytest.mark.parametrize("target", TARGETS)
def test_pods_outlive_the_ranks_and_whoever_started_them(target):
    for pod in all_pods(rendered(target, run={"preempt_grace": 39.5})):
        command = pod["spec"]["containers"][0]["command"]
        started = int(command[command.index("--grace") + 1])
        assert 40 < started < pod["spec"]["terminationGracePeriodSeconds"]


def test_mpijob_command():
    manifests = rendered("mpijob", kubernetes={"nodes": 3, "ranks_per_node": 2})
    spec = manifests["MPIJob"]["spec"]
    assert spec["slotsPerWorker"] == 2
    assert spec["sshAuthMountPath"] == "/home/orchestrator/.ssh"
    assert spec["launcherCreationPolicy"] == "WaitForWorkersReady"
    assert spec["mpiReplicaSpecs"]["Worker"]["replicas"] == 3
    launcher = pod_of(manifests["MPIJob"], "Launcher")["spec"]["containers"][0]
    assert " ".join(launcher["command"]) == (
        "python /opt/orchestrator/pod/launcher.py --hostfile /etc/mpi/hostfile -- "
        "orchestrator launch -np 6 --hostfile /etc/mpi/hostfile "
        "--launcher-args --network-interface eth0 --grace 30 -- "
        "python launch/train.py --config /etc/orchestrator/settings.yaml"
    )
    assert "envFrom" not in launcher
    worker = pod_of(manifests["MPIJob"])["spec"]["containers"][0]
    assert worker["ports"] == [{"name": "ssh", "containerPort": 2222}]
    assert worker["resources"]["requests"]["nvidia.com/gpu"] == 2
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "nvidia.com/gpu" not in launcher["resources"]["limits"]


def test_mpi_ranks_are_started_by_mpiexec():
    manifests = rendered("mpijob", run={"backend": "mpi"})
    command = pod_of(manifests["MPIJob"], "Launcher")["spec"]["containers"][0]["command"]
    assert "--mpi" in command
    assert "--launcher-args" not in command


def test_another_network_interface():
    kubernetes = {"network_interface": "net1"}
    launcher = pod_of(rendered("mpijob", kubernetes=kubernetes)["MPIJob"], "Launcher")
    assert "--network-interface net1" in launcher["spec"]["containers"][0]["command"]
    ranks = pod_of(rendered("job", kubernetes=kubernetes)["Job"])["spec"]["containers"][0]
    assert "--interface net1 --" in " ".join(ranks["command"])


@pytest.mark.parametrize(
    ("nodes", "ranks", "backend", "words"),
    [
        (1, 1, "mirrored", "python launch/train.py --config /etc/orchestrator/settings.yaml"),
        (1, 2, "auto", "orchestrator launch -np 2 --grace 30 -- python launch/train.py"),
        (4, 2, "auto", "python /opt/orchestrator/pod/node.py --nodes 4 --ranks 2 --first "
                       "train-0.train --grace 35 -- python launch/train.py"),
    ],
)  # fmt: skip
def test_job_command(nodes, ranks, backend, words):
    manifests = rendered(
        "job",
        run={"backend": backend},
        kubernetes={"nodes": nodes, "ranks_per_node": ranks},
    )
    spec = manifests["Job"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (nodes, nodes)
    template = spec["template"]["spec"]
    assert " ".join(template["containers"][0]["command"]).startswith(words)
    assert ("Service" in manifests) == (nodes > 1)
    if nodes > 1:
        service = manifests["Service"]
        assert service["metadata"]["name"] == template["subdomain"] == "train"
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True


def test_exit_75_and_drained_nodes_do_not_count_as_failures():
    rules = rendered("job")["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules] == [
        ("Ignore", None),
        ("Ignore", [75]),
        ("FailJob", [2]),
    ]
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_all_lost_workers_of_a_trainjob_count_as_restarts():
    kubernetes = {"nodes": 3, "max_restarts": 20}
    runtime = rendered("trainjob", kubernetes=kubernetes)["TrainingRuntime"]
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert {job["name"]: job["template"]["spec"]["backoffLimit"] for job in jobs} == {
        "launcher": 20,
        "node": 60,
    }


def test_the_settings_are_mounted_and_their_checksum_starts_pods_anew():
    first, second = rendered("mpijob"), rendered("mpijob", train={"epochs": 4})
    text = first["ConfigMap"]["data"]["settings.yaml"]
    assert yaml.safe_load(text) == {k: v for k, v in cases.GOOD.items() if k != "kubernetes"}
    pod = pod_of(first["MPIJob"])
    digest = pod["metadata"]["annotations"]["checksum/settings"]
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    assert digest != pod_of(second["MPIJob"])["metadata"]["annotations"]["checksum/settings"]
    assert {"name": "settings", "configMap": {"name": "train-settings"}} in pod["spec"]["volumes"]


def test_credentials_come_from_identity_or_a_secret():
    manifests = rendered(
        "mpijob",
        kubernetes={
            "credentials_secret": "s3-keys",
            "service_account": "trainer",
            "service_account_annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/t"},
        },
    )
    account = manifests["ServiceAccount"]
    assert account["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/t"
    }
    spec = pod_of(manifests["MPIJob"])["spec"]
    assert spec["serviceAccountName"] == "trainer"
    assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    assert "serviceAccountName" not in pod_of(manifests["MPIJob"], "Launcher")["spec"]


def test_an_account_that_is_there_is_not_made():
    assert "ServiceAccount" not in rendered("mpijob", kubernetes={"service_account": "trainer"})


def test_only_the_jobs_own_pods_may_connect():
    policy = rendered("mpijob")["NetworkPolicy"]["spec"]
    (ingress,) = policy["ingress"]
    assert ingress["from"] == [{"podSelector": policy["podSelector"]}]
    assert policy["policyTypes"] == ["Ingress"]
    assert "NetworkPolicy" not in rendered("mpijob", kubernetes={"network_policy": False})


@pytest.mark.parametrize(("drainable", "least"), [(True, 4), (False, 5)])
def test_disruption_budget_counts_the_launcher(drainable, least):
    kubernetes = {"nodes": 4, "drainable": drainable}
    budget = rendered("mpijob", kubernetes=kubernetes)["PodDisruptionBudget"]
    assert budget["spec"]["minAvailable"] == least
    budget = rendered("job", kubernetes=kubernetes)["PodDisruptionBudget"]
    assert budget["spec"]["minAvailable"] == least - 1


def test_queue_priority_places_and_times():
    manifests = rendered(
        "job",
        kubernetes={
            "queue": "team",
            "queue_priority": "low",
            "priority_class": "training",
            "node_selector": {"pool": "gpu"},
            "tolerations": ["spot=true:NoSchedule", "nvidia.com/gpu:NoExecute"],
            "max_hours": 1.5,
            "keep_hours": 0,
            "volume_claim": "runs",
            "volume_path": "/mnt/runs",
            "namespace": "ml",
        },
    )
    job = manifests["Job"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert (job["spec"]["activeDeadlineSeconds"], job["spec"]["ttlSecondsAfterFinished"]) == (
        5400,
        0,
    )
    spec = pod_of(job)["spec"]
    assert spec["priorityClassName"] == "training"
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["tolerations"] == [
        {"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"},
    ]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "runs"}} in spec["volumes"]
    assert {"name": "data", "mountPath": "/mnt/runs"} in spec["containers"][0]["volumeMounts"]
    assert {one["metadata"]["namespace"] for one in manifests.values()} == {"ml"}


TEXTS = ("$(HOME) ${B} $C", "echo $$", "$$(A)", "$$$", "$", "a)$(", "kill $$; echo $(A)$", "$(")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_reach_the_container_as_they_are(text):
    manifests = rendered("job", kubernetes={"env": {"A": text}, "command": ["sh", "-c", text]})
    container = pod_of(manifests["Job"])["spec"]["containers"][0]
    env = environment(container["env"], {})
    assert env["A"] == text
    assert expanded(container["command"][-1], env) == text


@pytest.mark.parametrize("target", ["mpijob", "trainjob"])
def test_a_launcher_has_the_users_variables_and_no_secret(target):
    """What starts ranks elsewhere hands them its own variables, over those of their pod."""
    kubernetes = {"env": {"HOME": "/tmp/me", "A": "$1"}, "credentials_secret": "s3-keys"}
    launcher, worker = (
        next(
            pod["spec"]["containers"][0]
            for pod in all_pods(rendered(target, kubernetes=kubernetes))
            if pod["metadata"]["labels"]["app.kubernetes.io/component"] == role
        )
        for role in ("launcher", "worker")
    )
    assert launcher["env"] == worker["env"]
    assert {"name": "HOME", "value": "/tmp/me"} in launcher["env"]
    assert "envFrom" in worker
    assert "envFrom" not in launcher


def test_a_users_variable_wins_and_stands_once():
    container = pod_of(rendered("job", kubernetes={"env": {"HOME": "/tmp/me"}})["Job"])["spec"]
    found = [one for one in container["containers"][0]["env"] if one["name"] == "HOME"]
    assert found == [{"name": "HOME", "value": "/tmp/me"}]


@pytest.mark.parametrize("target", TARGETS)
def test_yaml_is_read_back(target):
    manifests = render(settings(), target)
    assert list(yaml.safe_load_all(as_yaml(manifests))) == manifests
    assert "&id" not in as_yaml(manifests)
