"""A whole MPIJob without a cluster: rendered, laid out as mpi-operator does, run in namespaces.

Two worker pods and a launcher on hosts of their own, with the commands of the manifest, as an
ordinary user on a read-only root; checkpoints go to SeaweedFS.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from orchestrator.config import load
from orchestrator.kubernetes.pods import UID
from orchestrator.kubernetes.render import render
from tests import hosts, namespaces
from tests.checkpoint import servers

from .cases import ROOT
from .kubelet import NEEDED, PROJECT, Kubelet
from .mpi_operator import Operator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.servers,
    pytest.mark.skipif(bool(namespaces.missing(*NEEDED)), reason=namespaces.missing(*NEEDED)),
]

OVERLAY = ROOT / "k8s" / "overlays" / "s3" / "settings.yaml"
# The overlay's role of a service account needs a cloud; the Secret is the other way.
WORDS = [
    *("run.deterministic=true", "train.epochs=4", "checkpoint.every_steps=25"),
    *("kubernetes.service_account=null", "kubernetes.service_account_annotations={}"),
    "kubernetes.credentials_secret=storage",
    "model.factory=tests.distributed.holding:model",
]
ENV = {
    # Four ranks on few cores.
    **{"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2", "OMP_NUM_THREADS": "1"},
    **{"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"},
    "PYTHONPATH": PROJECT,  # where the tests are found
    # What the launcher has of its own, and what Kubernetes and shells would read.
    **{"HOME": "/tmp/me", "DOLLARS": "echo $$ $(HOME) '$HOME'"},
}


class Cluster:
    """A job's pods, and the storage that they write to."""

    def __init__(self, net, storage, url, folder):
        self.net, self.storage, self.url = net, storage, url
        env = json.dumps({**ENV, "HOLD": f"{url}/hold"})
        settings = load(OVERLAY, [*WORDS, f"run.dir={url}", f"kubernetes.env={env}"])
        manifests = {one["kind"]: one for one in render(settings, "mpijob")}
        self.operator = Operator(manifests["MPIJob"], "default")
        config = manifests["ConfigMap"]
        secret = {
            "AWS_ACCESS_KEY_ID": servers.KEY,
            "AWS_SECRET_ACCESS_KEY": servers.SECRET,
            "AWS_ENDPOINT_URL": f"http://{net.gateway}:{storage.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        folder.mkdir()
        self.kubelet = Kubelet(
            net,
            {
                ("configMap", config["metadata"]["name"]): encoded(config["data"]),
                ("secret", "storage"): encoded(secret),
                **self.operator.volumes(folder),
            },
        )
        self.pods = []
        for name in self.operator.workers:
            self.start_worker(name)

    def start_worker(self, name):
        return self.start(self.operator.names(name), self.operator.worker(name))

    def start_launcher(self):
        pod = self.operator.launcher()
        assert pod["restartPolicy"] == "Never"
        return self.start(pod["hostname"], pod)

    def start(self, names, pod):
        self.pods.append(self.kubelet.start(names, pod))
        return self.pods[-1]

    def wait_until_ready(self):
        """As the readiness probe says."""
        (container,) = self.operator.worker("")["containers"]
        (port,) = [port["containerPort"] for port in container["ports"]]
        assert container["readinessProbe"]["tcpSocket"]["port"] == container["ports"][0]["name"]
        for name in self.operator.workers:
            namespaces.wait(lambda name=name: self.answers(name, port), f"sshd of {name}")

    def answers(self, name, port):
        try:
            with self.net.inside(), socket.create_connection((self.net.address(name), port), 1):
                return True
        except OSError:
            return False

    @contextlib.contextmanager
    def bucket(self):
        """A client of the storage, and where the run's directory begins in the bucket."""
        with self.net.inside(), contextlib.closing(servers.client(self.storage.port)) as s3:
            yield s3, self.url.removeprefix(f"{self.storage.url}/") + "/"

    def read(self, pattern):
        """Texts of the run's directory whose place there matches, by place."""
        with self.bucket() as (s3, prefix):
            listed = s3.list_objects_v2(Bucket=servers.BUCKET, Prefix=prefix).get("Contents", [])
            places = [one["Key"].removeprefix(prefix) for one in listed]
            return {
                place: s3.get_object(Bucket=servers.BUCKET, Key=prefix + place)["Body"].read()
                for place in places
                if re.fullmatch(pattern, place)
            }

    def start_and_hold(self):
        """The launcher, whose four ranks hold still between two checkpoints."""
        launcher = self.start_launcher()
        held = functools.partial(self.read, r"hold/at-\d")
        namespaces.wait(lambda: len(held()) == 4, "all ranks' step", 200, launcher.process)
        namespaces.wait(lambda: 25 in self.committed(), "the last checkpoint", 30)
        return launcher

    def start_again(self):
        """The Job's next launcher and, later, the operator's next worker; where they resume."""
        launcher = self.start_launcher()
        namespaces.wait(
            lambda: "waiting up to" in launcher.text(), "its waiting", 60, launcher.process
        )
        self.start_worker(self.operator.workers[1])
        assert launcher.process.wait(300) == 0
        found = re.search(r"Continuing at epoch \d+, batch \d+ \(step (\d+)\)", launcher.text())
        assert found, launcher.text()
        return int(found[1])

    def go_on(self):
        """Lets the ranks that hold still go on."""
        with self.bucket() as (s3, prefix):
            s3.put_object(Bucket=servers.BUCKET, Key=f"{prefix}hold/go", Body=b"")

    def committed(self):
        """The steps of the checkpoints that are there."""
        found = self.read(r"checkpoints/step-\d+/manifest.json")
        return sorted(int(place.split("/")[1].removeprefix("step-")) for place in found)

    def came_to(self):
        """The weights' digest, the history and the decisions of a run that ended well."""
        (outcome,) = self.read("outcome.json").values()
        assert json.loads(outcome)["exit_code"] == 0
        (lines,) = self.read("events.jsonl").values()
        (history,) = self.read("history.csv").values()
        events = [json.loads(line) for line in lines.splitlines()]
        end = events[-1]
        assert (end["kind"], end["ranks_alike"]) == ("end", 4)
        kinds = ("best", "plateau", "stop", "restore", "end")
        decisions = [(e["kind"], e["epoch"], e["step"]) for e in events if e["kind"] in kinds]
        return end["weights"], history, decisions


def encoded(texts):
    return {name: text.encode() for name, text in texts.items()}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The network, and in it the storage server."""
    folder = tmp_path_factory.mktemp("job")
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(hosts.Network(folder / "net"))
        with net.inside():
            server = servers.seaweedfs(folder / "s3", bind="0.0.0.0")
            storage = stack.enter_context(server)
        yield net, storage, folder


@contextlib.contextmanager
def cluster(started, name):
    """The job's workers, ready; whatever goes wrong, the pods' logs are shown."""
    net, storage, folder = started
    made = Cluster(net, storage, f"{storage.url}/{name}", folder / name)
    try:
        made.wait_until_ready()
        yield made
    except BaseException:
        for pod in made.pods:
            print(f"--- {pod.log.name}\n{pod.text()[-4000:]}")
        raise
    finally:
        for pod in made.pods:
            pod.signal(signal.SIGKILL)
            pod.process.wait(namespaces.DEADLINE)


def assert_confined(job):
    """Each process of the pods runs as their manifest says; two ranks run on each worker.

    A rank has the variables that the settings give it.
    """
    ranks = []
    for pod in job.pods:
        processes = job.net.processes(pod.name) | {pod.first: "1"}
        command = "python launch/train.py --config /etc/orchestrator/settings.yaml"
        ranks.append(sum(line == command for line in processes.values()))
        for pid, line in processes.items():
            if line == command:
                env = Path(f"/proc/{pid}/environ").read_text().split("\0")
                assert {f"{name}={value}" for name, value in ENV.items()} <= set(env)
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            assert status["Uid"].split() == status["Gid"].split() == 4 * [str(UID)]
            assert status["Groups"].split() == [str(UID)]
            assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
            assert status["NoNewPrivs"] == "1"
        mounts = [
            line.split() for line in Path(f"/proc/{pod.first}/mounts").read_text().splitlines()
        ]
        writable = {at for _, at, _, options, *_ in mounts if options.split(",")[0] == "rw"}
        assert {at for at in writable if not at.startswith(("/dev", "/proc"))} == {"/tmp"}
    assert ranks == [2, 2, 0]


@pytest.fixture(scope="module")
def whole(started):
    """What a job comes to that nothing happens to."""
    with cluster(started, "whole") as job:
        launcher = job.start_and_hold()
        assert_confined(job)
        job.go_on()
        assert launcher.process.wait(300) == 0
        # The operator then deletes the workers (cleanPodPolicy: Running).
        for pod in job.pods:
            pod.signal(signal.SIGTERM)
        assert [pod.process.wait(30) for pod in job.pods] == [143, 143, 0]
        return job.came_to()


def test_a_job_finishes(whole):
    weights, history, decisions = whole
    assert len(weights) > 8
    assert len(history.splitlines()) == 5
    assert decisions[-1] == ("end", 3, 92)


def test_a_job_that_lost_a_worker_goes_on_to_the_same_result(started, whole):
    with cluster(started, "lost") as job:
        launcher = job.start_and_hold()
        job.pods[1].signal(signal.SIGKILL)
        killed = time.monotonic()
        job.go_on()
        assert launcher.process.wait(60) not in (0, 75)
        print(f"the launcher ended {time.monotonic() - killed:.1f} s after a worker was killed")
        before = job.committed()
        assert job.start_again() == before[-1] == 25
        assert job.came_to() == whole


def test_a_job_whose_worker_is_preempted_commits_first_and_goes_on_from_there(started, whole):
    with cluster(started, "preempted") as job:
        launcher = job.start_and_hold()
        worker = job.pods[1]
        worker.signal(signal.SIGTERM)
        namespaces.wait(lambda: "told 2 processes" in worker.text(), "its ranks told")
        job.go_on()
        assert launcher.process.wait(60) == 75
        assert worker.process.wait(30) == 143
        (outcome,) = map(json.loads, job.read("outcome.json").values())
        assert outcome["exit_code"] == 75
        assert job.committed()[-1] == outcome["step"]
        assert job.start_again() == outcome["step"]
        assert job.came_to() == whole
