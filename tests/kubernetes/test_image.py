"""The image's Dockerfile: linted, and every RUN step's script run in a fresh folder.

No container engine is needed, and none has built it: what a base image brings is not seen here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.kubernetes.pods import SCRIPTS, SSH_KEYS, SSH_PORT, UID

from .cases import ROOT

DOCKERFILE = ROOT / "k8s" / "Dockerfile"
IMAGE = ROOT / "k8s" / "image"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def instructions():
    """(instruction, rest) of each line, continued lines joined, comments left out."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def steps():
    """The script and the arguments of each RUN step."""
    commands = [
        command.split() for name, rest in instructions() if name == "RUN"
        for command in rest.split("&&")
    ]  # fmt: skip
    return [(Path(words[0]).name, words[1:]) for words in commands]


def step(script):
    found = [arguments for name, arguments in steps() if name == script]
    assert found, f"no RUN step runs {script}"
    return found


def run(script, *words, timeout=60, **environment):
    return subprocess.run(
        [str(IMAGE / script), *map(str, words)],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def stand_in(folder, *names, script="exit 0"):
    """Programs that stand for real ones, in a folder for PATH."""
    for name in names:
        program = folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return folder


def context(folder):
    """What .dockerignore lets into the build."""
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    for name in kept:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    return folder


def test_every_step_is_one_of_the_scripts():
    scripts = {"system", "environment", "user", "strip", "check", "bare"}
    assert {name for name, _ in steps()} == scripts
    for name in scripts:
        assert os.access(IMAGE / name, os.X_OK)
        subprocess.run(["sh", "-n", str(IMAGE / name)], check=True)


def test_the_linter_finds_nothing():
    command = [str(BIN / "hadolint"), str(DOCKERFILE)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_bases_are_pinned_by_digests_without_defaults():
    froms = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert len(froms) == 4
    given = {rest for name, rest in instructions() if name == "ARG"}
    for base in froms:
        (digest,) = re.findall(r"@\$\{(\w+_DIGEST)\}$", base)
        assert digest in given


def test_the_last_stages_run_as_the_pods_user():
    for stage in re.split(r"(?m)^FROM ", TEXT)[1:]:
        if re.match(r"\S+ AS (cpu|gpu)\n", stage):
            assert re.findall(r"(?m)^USER (.*)$", stage) == [f"{UID}:{UID}"]
            assert f"COPY k8s/pod {SCRIPTS}\n" in stage
            assert "WORKDIR /app" in stage
            assert "COPY launch /app/launch" in stage


def test_what_is_copied_is_let_in_and_nothing_else(tmp_path):
    folder = context(tmp_path)
    for name, rest in instructions():
        words = rest.split()
        if name == "COPY" and not words[0].startswith("--"):
            for source in words[:-1]:
                assert (folder / source).exists(), source
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert not [name for name in names if name.startswith((".git", "tests", "runs", ".venv"))]


def test_system_packages(tmp_path):
    log = tmp_path / "log"
    programs = stand_in(tmp_path, "apt-get", "rm", script=f'echo "${{0##*/}} $*" >> {log}')
    for packages in step("system"):
        log.unlink(missing_ok=True)
        done = run("system", *packages, PATH=f"{programs}:/usr/bin:/bin")
        assert done.returncode == 0, done.stderr
        update, install, remove = log.read_text().splitlines()
        assert update == "apt-get update"
        assert install == f"apt-get install --yes --no-install-recommends {shlex.join(packages)}"
        assert "/etc/ssh/ssh_host_*" in remove or "/etc/ssh/ssh_host_" in remove


def test_the_distribution_has_these_packages():
    packages = {word for words in step("system") for word in words}
    if shutil.which("apt-cache") is None:
        pytest.skip("no apt on this machine")
    shown = subprocess.run(
        ["apt-cache", "policy", *sorted(packages)], capture_output=True, text=True, timeout=60
    )
    if "Candidate" not in shown.stdout:
        pytest.skip("apt has no package lists here")
    for package in packages:
        assert f"{package}:" in shown.stdout
    assert "Candidate: (none)" not in shown.stdout


def test_user(tmp_path):
    (tmp_path / "etc").mkdir()
    assert step("user") == [["/"], ["/"]]
    assert run("user", f"{tmp_path}/").returncode == 0
    name, _, uid, gid, _, home, shell = (tmp_path / "etc/passwd").read_text().strip().split(":")
    assert (name, uid, gid, shell) == ("orchestrator", str(UID), str(UID), "/bin/sh")
    assert f"{home}/.ssh" == SSH_KEYS
    assert (tmp_path / SSH_KEYS[1:]).is_dir()
    assert (tmp_path / "etc/group").read_text() == f"orchestrator:x:{UID}:\n"


def test_strip(tmp_path):
    kept = tmp_path / "usr/local/lib/python3.11/site-packages/kept"
    gone = [
        tmp_path / "usr/local/bin/pip3",
        tmp_path / "usr/local/lib/python3.11/site-packages/pip/__main__.py",
        tmp_path / "usr/local/lib/python3.11/ensurepip/__init__.py",
    ]
    for path in (kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert run("strip", f"{tmp_path}/").returncode == 0
    assert kept.exists()
    assert not any(path.exists() for path in gone)


def test_bare(tmp_path):
    (tools := tmp_path / "bin").mkdir()
    script = (IMAGE / "bare").read_text()
    # Only what stands in the test's folder counts, not this machine's own tools.
    alone = tmp_path / "bare"
    alone.write_text(re.sub(r"(?m)^PATH=.*$", "", script))
    alone.chmod(0o755)

    def bare():
        done = subprocess.run(
            ["/bin/sh", str(alone)], env={"PATH": str(tools)}, capture_output=True, text=True
        )
        return done.returncode, done.stderr.strip()

    assert bare() == (1, "bare: ssh is missing")
    stand_in(tools, "ssh", "ssh-keygen", "sshd")
    assert bare() == (0, "")
    stand_in(tools, "g++")
    assert bare() == (1, "bare: g++ is left in the image")


def test_check_asks_for_the_parts(tmp_path):
    said = "Available Controllers:\n    [X] Gloo\n\nAvailable Frameworks:\n    [X] TensorFlow"
    stand_in(tmp_path, "horovodrun", script=f"cat <<'END'\n{said}\nEND")
    stand_in(tmp_path, "orchestrator", "python")
    path = f"{tmp_path}:/usr/bin:/bin"
    assert [words for words in step("check")] == [["cpu"], ["gpu"]]
    assert run("check", "cpu", PATH=path).returncode == 0
    done = run("check", "gpu", PATH=path)
    assert done.returncode == 1
    assert "Horovod was built without NCCL" in done.stderr
    stand_in(tmp_path, "orchestrator", script="exit 3")
    assert run("check", "cpu", PATH=path).returncode == 3


def test_an_environment_of_another_kind_is_refused(tmp_path):
    done = run("environment", "tpu", tmp_path)
    assert done.returncode == 2
    assert "neither cpu nor gpu" in done.stderr


def pins(file):
    """(name, version, marker) of each pin: a package may have one for each of several markers."""
    pin = r"(?m)^([a-z0-9._-]+)(?:\[[\w,-]+\])?==([^\s;]+)(?: ; (.*?))? *\\?$"
    return set(re.findall(pin, file.read_text()))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_image_has_the_versions_that_are_tested(kind):
    image = pins(IMAGE / f"requirements-{kind}.lock")
    tested = pins(ROOT / f"requirements{'' if kind == 'cpu' else '-gpu'}.lock")
    names = {name for name, _, _ in image}
    assert {"tensorflow", "keras", "s3fs", "gcsfs", "mpi4py", "pydantic", "cmake"} <= names
    assert len(image) > len(names), "none is pinned by markers: are they read?"
    assert ("nvidia-nccl-cu12" in names) == (kind == "gpu")
    assert not {"pytest", "moto", "ruff"} & names
    assert sorted(image - tested) == [], "pin them anew with k8s/image/lock"
    assert sorted(pin for pin in tested - image if pin[0] in names) == []


def test_ssh_goes_to_the_workers_port():
    assert f"Port {SSH_PORT}\n" in (IMAGE / "ssh_config").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_environment_is_built_and_works(tmp_path):
    """As in the image: from the build's files alone, into a folder of its own."""
    source = context(tmp_path / "src")
    (cpu, folder), *_ = step("environment")
    assert (cpu, folder) == ("cpu", "/opt/venv")
    venv = tmp_path / "venv"
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in ("HOME", "XDG_CACHE_HOME") or name.startswith(("PIP_", "SSL_"))
    }
    environment = {"PATH": os.environ["PATH"], **passed}
    built = subprocess.run(
        [str(source / "k8s/image/environment"), "cpu", str(venv)],
        env=environment, capture_output=True, text=True, timeout=1400,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    path = f"{venv / 'bin'}:/usr/bin:/bin"
    checked = run("check", "cpu", timeout=120, PATH=path, HOME=str(tmp_path))
    assert checked.returncode == 0, checked.stderr
    assert not [name for name in ("pip", "cmake") if (venv / "bin" / name).exists()]
    installed = subprocess.run(
        [str(venv / "bin/python"), "-c", "import orchestrator; print(orchestrator.__file__)"],
        cwd="/", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert installed.stdout.startswith(str(venv))
