"""Runs pods as a kubelet and a container runtime do, in namespaces of a `tests.hosts.Network`.

A container's root is read-only: this machine's /usr, the environment that the tests run in, and
what the Dockerfile puts there. User, groups, capabilities, environment, command, and volumes with
their modes are those of the pod's spec. Not done: limits of CPU and memory, seccomp, probes.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import join

from orchestrator.kubernetes.names import quantity
from tests.hosts import Network

from .cases import ROOT
from .mpi_operator import Tree, Volumes

NEEDED = ("pivot_root",)
# Where the environment that the tests run in looks for this project.
_DIRECT_URL = importlib.metadata.distribution("keras-orchestrator").read_text("direct_url.json")
PROJECT = json.loads(_DIRECT_URL or "")["url"].removeprefix("file://")
_NUMBERS = itertools.count(1)
_DEVICES = ("null", "zero", "full", "random", "urandom")


class Image:
    """What the Dockerfile's stage `cpu` makes, without building it.

    Attributes:
        env: Its environment.
        folder: Where its commands start.
    """

    def __init__(self) -> None:
        text = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
        (stage,) = re.findall(r"^FROM \S+ AS cpu\n(.*?)^FROM ", text, re.DOTALL | re.MULTILINE)
        steps = [line.split() for line in stage.splitlines() if line and line[0] != "#"]
        self.env = dict(w.split("=", 1) for name, *words in steps for w in words if name == "ENV")
        (self.folder,) = [words[0] for name, *words in steps if name == "WORKDIR"]
        copies = [words for name, *words in steps if name == "COPY"]
        (self._venv,) = [words[-1] for words in copies if words[0].startswith("--from=cpu-build")]
        # Below /usr lies this machine's.
        self._copies = [w for w in copies if w[0][0] != "-" and not w[-1].startswith("/usr/")]

    def lay_out(self, root: Path) -> None:
        """Its files that are not mounted."""
        for name in ("bin", "lib", "lib64", "sbin"):
            if os.path.islink(f"/{name}"):
                (root / name).symlink_to(os.readlink(f"/{name}"))
        for name in ("proc", "sys", "dev", "tmp", "etc/ssh/ssh_config.d", self.folder[1:]):
            (root / name).mkdir(parents=True)
        (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (root / "etc" / "group").write_text("root:x:0:\n")
        (root / "etc" / "hosts").write_text("")
        for name in ("ld.so.cache", "nsswitch.conf", "ssh/ssh_config"):
            shutil.copy(f"/etc/{name}", root / "etc" / name)
        subprocess.run([ROOT / "k8s" / "image" / "user", root], check=True)
        for *sources, at in self._copies:
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, root / at[1:])
        for _, at in self.mounts():
            (root / at[1:]).mkdir(parents=True, exist_ok=True)

    def mounts(self) -> Iterator[tuple[str, str]]:
        """What is mounted from this machine, and where: /usr, and Python with its environment.

        That names places, where it has to be as well: the project's, its own, its Python's.
        """
        yield str(ROOT), PROJECT
        for place in ("bin", "lib", "lib64", "sbin"):
            if os.path.isdir(f"/{place}") and not os.path.islink(f"/{place}"):
                yield f"/{place}", f"/{place}"
        yield "/usr", "/usr"
        if not sys.base_prefix.startswith("/usr"):
            yield sys.base_prefix, sys.base_prefix
        yield sys.prefix, sys.prefix
        yield sys.prefix, self._venv


@dataclass(frozen=True)
class Pod:
    """A pod that was started.

    Attributes:
        name: That no other has.
        process: It ends as the container does.
        first: PID 1 of the container, as the machine counts.
        log: What the container prints.
    """

    name: str
    process: subprocess.Popen[bytes]
    first: int
    log: Path

    def signal(self, number: int) -> None:
        """To PID 1, as the kubelet and the kernel do; nothing if it has ended."""
        if self.process.poll() is None:
            os.kill(self.first, number)

    def text(self) -> str:
        """The log."""
        return self.log.read_text("utf-8", "replace")


class Kubelet:
    """A node of a cluster for each pod.

    Args:
        net: Where the pods' hosts are joined.
        volumes: The data of ConfigMaps and Secrets, by kind and name.
    """

    def __init__(self, net: Network, volumes: Volumes) -> None:
        self._net = net
        self._volumes = volumes
        self._image = Image()

    def start(self, names: str, pod: Tree) -> Pod:
        """Runs the container of a new pod.

        Args:
            names: What it is found by, its own first.
            pod: Its spec.
        """
        name = f"{names.split()[0]}.{next(_NUMBERS)}"
        root = self._net.folder / name / "root"
        root.mkdir(parents=True)
        self._image.lay_out(root)
        script = "\n".join(self._script(root, pod))
        process = self._net.add(f"{name} {names}", ["sh", "-c", script])
        return Pod(name, process, self._net.pids[name], self._net.folder / f"{name}.log")

    def _script(self, root: Path, pod: Tree) -> Iterator[str]:
        """What makes the container around itself and becomes its command."""
        (container,) = pod["containers"]
        yield "set -eu"
        yield join(["hostname", pod["hostname"]])
        yield f"mount --bind {root} {root}"
        for source, at in self._image.mounts():
            yield _bound(source, f"{root}{at}", read_only=True)
        yield _bound("/sys", f"{root}/sys", read_only=True)
        yield f"mount -t proc proc {root}/proc"
        yield f"mount -t tmpfs -o mode=755 none {root}/dev"
        for device in _DEVICES:
            yield f"touch {root}/dev/{device}"
            yield _bound(f"/dev/{device}", f"{root}/dev/{device}")
        yield f"mkdir {root}/dev/shm && mount -t tmpfs -o size=64m none {root}/dev/shm"
        yield f"ln -s /proc/self/fd {root}/dev/fd"
        # The cluster's name server.
        yield _bound(f"{self._net.folder}/hosts", f"{root}/etc/hosts", read_only=True)
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            at = f"{root}{mount['mountPath']}"
            yield f"mkdir -p {at}"
            yield self._mounted(root.parent, volumes[mount["name"]], at, pod)
            if mount.get("readOnly"):
                yield f"mount -o remount,bind,ro {at}"
        covered = tuple(f"{mount['mountPath']}/" for mount in container["volumeMounts"])
        for source, at in self._image.mounts():
            if at.startswith(covered):  # of a project below /tmp
                yield f"mkdir -p {root}{at}"
                yield _bound(source, f"{root}{at}", read_only=True)
        if container["securityContext"]["readOnlyRootFilesystem"]:
            yield f"mount -o remount,bind,ro {root}"
        yield f"cd {root} && pivot_root . . && umount -l . && cd {self._image.folder}"
        yield "echo ready"
        yield "read -r go"
        yield "exec >&2 < /dev/null"
        env = self._environment(container)
        words = [expanded(w, env) for w in (*container["command"], *container.get("args", []))]
        env = {**self._image.env, "HOSTNAME": pod["hostname"], **env}
        given = [f"{name}={value}" for name, value in env.items()]
        yield join(["exec", *_as_user(pod, container), "env", "-i", *given, *words])

    def _environment(self, container: Tree) -> dict[str, str]:
        secrets: dict[str, str] = {}
        for source in container.get("envFrom", []):
            data = self._volumes["secret", source["secretRef"]["name"]]
            secrets |= {name: value.decode() for name, value in data.items()}
        return environment(container["env"], secrets)

    def _mounted(self, folder: Path, volume: Tree, at: str, pod: Tree) -> str:
        """How a volume is mounted; its files are made here."""
        group = pod["securityContext"]["fsGroup"]
        made = folder / volume["name"]
        if "emptyDir" in volume:
            size = quantity(volume["emptyDir"]["sizeLimit"])
            if volume["emptyDir"].get("medium") == "Memory":
                return f"mount -t tmpfs -o size={size},mode=2777,gid={group} none {at}"
            made.mkdir()
            os.chown(made, 0, group)
            made.chmod(0o2777)
            return _bound(str(made), at)
        (kind,) = {"configMap", "secret"} & set(volume)
        source = volume[kind]
        data = self._volumes[kind, source.get("name") or source["secretName"]]
        every = [{"key": key, "path": key} for key in data]
        default = source.get("defaultMode", 0o644)
        # As the kubelet's AtomicWriter does, and then SetVolumeOwnership for the pod's group.
        (made / "..data-1").mkdir(parents=True)
        (made / "..data").symlink_to("..data-1")
        for item in source.get("items", every):
            file = made / "..data-1" / item["path"]
            file.write_bytes(data[item["key"]])
            os.chown(file, 0, group)
            file.chmod(item.get("mode", default) | 0o440)
            (made / item["path"]).symlink_to(f"..data/{item['path']}")
        for one in (made, made / "..data-1"):
            os.chown(one, 0, group)
            one.chmod(0o2775)
        return _bound(str(made), at, read_only=True)


def environment(given: list[Tree], secrets: dict[str, str]) -> dict[str, str]:
    """A container's variables; a value may name those before it (makeEnvironmentVariables)."""
    env = dict(secrets)
    for one in given:
        env[one["name"]] = expanded(one["value"], env)
    return env


def expanded(text: str, env: dict[str, str]) -> str:
    """A value or a word as the container gets it.

    After Kubernetes' third_party/forked/golang/expansion: `$$` is `$`, `$(NAME)` a variable's value
    or, of one that is not there, itself; any other `$` stays.
    """

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else env.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


def _bound(source: str, at: str, *, read_only: bool = False) -> str:
    made = f"mount --bind {source} {at}"
    return f"{made} && mount -o remount,bind,ro {at}" if read_only else made


def _as_user(pod: Tree, container: Tree) -> list[str]:
    """`setpriv` with what the security contexts say."""
    user, own = pod["securityContext"], container["securityContext"]
    assert user["runAsNonRoot"] <= (user["runAsUser"] != 0)
    words = [f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}"]
    words += [f"--groups={user['fsGroup']}"]
    words += ["--no-new-privs"] if not own["allowPrivilegeEscalation"] else []
    assert own["capabilities"] == {"drop": ["ALL"]}
    return ["setpriv", *words, "--inh-caps=-all", "--bounding-set=-all"]
