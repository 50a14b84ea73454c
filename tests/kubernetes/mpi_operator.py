"""What mpi-operator makes of an MPIJob: the pods, and what it mounts in them. Version 0.6.

After its pkg/controller/mpi_job_controller.go: newWorker, newLauncherPodTemplate, newConfigMap,
newSSHAuthSecret, setupSSHOnPod.
"""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
Volumes = dict[tuple[str, str], dict[str, bytes]]

_ROOT_SSH = "/root/.ssh"
_SSH_ITEMS = [
    {"key": "ssh-privatekey", "path": "id_rsa"},
    {"key": "ssh-publickey", "path": "id_rsa.pub"},
    {"key": "ssh-publickey", "path": "authorized_keys"},
]
_CONFIG_ITEMS = [
    {"key": "hostfile", "path": "hostfile", "mode": 0o444},
    {"key": "discover_hosts.sh", "path": "discover_hosts.sh", "mode": 0o555},
]
_OPEN_MPI = {
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
    "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
}


class Operator:
    """One MPIJob's.

    Args:
        job: The MPIJob.
        namespace: That it is applied in.
    """

    def __init__(self, job: Tree, namespace: str) -> None:
        self._spec = job["spec"]
        self._name = job["metadata"]["name"]
        self._namespace = job["metadata"].get("namespace", namespace)
        assert self._spec["mpiImplementation"] == "OpenMPI", "the host file has another form"

    @property
    def workers(self) -> list[str]:
        """The names of the workers' pods, which are their host names."""
        replicas = self._spec["mpiReplicaSpecs"]["Worker"]["replicas"]
        return [f"{self._name}-worker-{index}" for index in range(replicas)]

    def names(self, pod: str) -> str:
        """What a pod is found by: its name, and that in the job's Service."""
        service = f"{pod}.{self._name}.{self._namespace}.svc"
        return f"{pod} {service} {service}.cluster.local"

    def volumes(self, folder: Path) -> Volumes:
        """The ConfigMap with the host file and the Secret with the job's key; made in a folder."""
        key = folder / "id"
        made = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f"]
        subprocess.run([*made, str(key)], check=True, timeout=60)
        slots = self._spec["slotsPerWorker"]
        hosts = [self.names(worker).split()[1] for worker in self.workers]
        listed = "".join(f"{host} slots={slots}\n" for host in hosts)
        found = "".join(f"echo {host}\n" for host in hosts)
        config = {"hostfile": listed, "discover_hosts.sh": f"#!/bin/sh\n{found}"}
        return {
            ("configMap", f"{self._name}-config"): {k: v.encode() for k, v in config.items()},
            ("secret", f"{self._name}-ssh"): {
                "ssh-privatekey": key.read_bytes(),
                "ssh-publickey": key.with_suffix(".pub").read_bytes(),
            },
        }

    def worker(self, name: str) -> Tree:
        """The pod of a worker."""
        return self._pod("Worker", name, {"K_MPI_JOB_ROLE": "worker"})

    def launcher(self) -> Tree:
        """The pod that the launcher's Job makes."""
        more = {
            "K_MPI_JOB_ROLE": "launcher",
            **_OPEN_MPI,
            "OMPI_MCA_orte_set_default_slots": str(self._spec["slotsPerWorker"]),
            "NVIDIA_VISIBLE_DEVICES": "",
            "NVIDIA_DRIVER_CAPABILITIES": "",
        }
        pod = self._pod("Launcher", f"{self._name}-launcher", more)
        config = {"name": f"{self._name}-config", "items": _CONFIG_ITEMS}
        self._mount(pod, "/etc/mpi", {"name": "mpi-job-config", "configMap": config})
        return pod

    def _pod(self, role: str, hostname: str, more: dict[str, str]) -> Tree:
        replica = self._spec["mpiReplicaSpecs"][role]
        pod = copy.deepcopy(replica["template"]["spec"])
        pod |= {
            "hostname": hostname,
            "subdomain": self._name,
            "restartPolicy": replica["restartPolicy"],
        }
        container = pod["containers"][0]
        container["env"] += [{"name": name, "value": value} for name, value in more.items()]
        at = self._spec["sshAuthMountPath"]
        secret: Tree = {"secretName": f"{self._name}-ssh", "items": _SSH_ITEMS}
        secret |= {"defaultMode": 0o600} if at == _ROOT_SSH else {}
        self._mount(pod, at, {"name": "ssh-auth", "secret": secret})
        return pod

    def _mount(self, pod: Tree, at: str, volume: Tree) -> None:
        pod["volumes"].append(volume)
        mount = {"name": volume["name"], "mountPath": at}
        pod["containers"][0]["volumeMounts"].append(mount)
