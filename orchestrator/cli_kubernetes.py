"""The `orchestrator k8s` commands."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator import jobs
from orchestrator.cluster import Cluster
from orchestrator.config import SettingError, Settings, load
from orchestrator.kubernetes.render import as_yaml
from orchestrator.kubernetes.render import render as manifests

app = typer.Typer(no_args_is_help=True, help="Run on Kubernetes: manifests from the settings.")


File = Annotated[Path, typer.Argument(help="The run's settings, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="train.epochs=5")
]
Target = Annotated[
    str | None, typer.Option(help="mpijob, job or trainjob; kubernetes.target by default.")
]
Alpha = Annotated[bool, typer.Option("--alpha", help="Allow trainjob, whose API still changes.")]
Context = Annotated[str | None, typer.Option(help="Of the kubeconfig; the current one by default.")]


def _manifests(
    file: Path, overrides: list[str] | None, target: str | None, alpha: bool
) -> tuple[Settings, list[dict[str, Any]]]:
    settings = load(file, overrides or [])
    target = target or settings.kubernetes.target
    if target == "trainjob" and not alpha:
        raise SettingError(
            "target=trainjob is alpha: Kubeflow Trainer's v1alpha1 API changes between releases, "
            "and this has not run on a cluster. Add --alpha, or use mpijob or job."
        )
    return settings, manifests(settings, target)


def _cluster(settings: Settings, context: str | None) -> Cluster:
    return Cluster(context, settings.kubernetes.namespace)


@contextlib.contextmanager
def _server_errors() -> Iterator[None]:
    """What the API server or the way to it says, as one line and exit code 1."""
    try:
        yield
    except Exception as error:
        # Imported only now: the client is an extra, and here it has been in use.
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        if isinstance(error, ApiException):
            raise OSError(f"the API server refused: {error.status} {error.body or ''}") from None
        if isinstance(error, HTTPError):
            raise OSError(f"the API server cannot be reached: {error}") from None
        raise


@app.command()
def render(
    settings: File,
    overrides: Overrides = None,
    target: Target = None,
    alpha: Alpha = False,
) -> None:
    """Print the manifests of a run, for `kubectl apply -f -`."""
    _, made = _manifests(settings, overrides, target, alpha)
    print(as_yaml(made), end="")


@app.command()
def validate(
    paths: Annotated[list[Path], typer.Argument(help="Files, and folders of .yaml files.")],
) -> None:
    """Check manifests without a cluster; ends with 2 if anything is wrong."""
    # kubernetes-validate is an extra, and render does without it.
    from orchestrator.kubernetes.validate import validate as check

    try:
        problems = check(paths)
    except ImportError as error:
        raise SettingError(str(error)) from None
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(2)


@app.command()
def submit(
    settings: File,
    overrides: Overrides = None,
    target: Target = None,
    alpha: Alpha = False,
    context: Context = None,
    resubmit: Annotated[
        int, typer.Option(min=0, help="Make a preempted or evicted job anew, so many times.")
    ] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
) -> None:
    """Start a run, show rank 0's log, and end with the run's exit code."""
    read, made = _manifests(settings, overrides, target, alpha)
    with _server_errors():
        where = _cluster(read, context)
        if detach:
            where.apply(made)
            print(f"k8s: submitted to {where.namespace}: orchestrator k8s logs {settings}")
            return
        code = jobs.submit(where, made, functools.partial(print, flush=True), resubmit=resubmit)
    raise typer.Exit(code)


@app.command()
def status(
    settings: File,
    overrides: Overrides = None,
    target: Target = None,
    alpha: Alpha = False,
    context: Context = None,
) -> None:
    """Show how the job and its pods stand; ends with 1 if it failed or is not there."""
    read, made = _manifests(settings, overrides, target, alpha)
    job = jobs.job_of(made)
    with _server_errors():
        where = _cluster(read, context)
        stands = jobs.state(where.get(job))
        pods = where.pods(job["metadata"]["name"])
    print(f"{job['kind']} {job['metadata']['name']}: {stands.reason}")
    for pod in reversed(pods):
        code = jobs.exit_code(pod)
        phase = pod.get("status", {}).get("phase", "Unknown")
        why = pod.get("status", {}).get("reason", "" if code is None else f"exit code {code}")
        print(f"  {pod['metadata']['name']}: {phase} {why}".rstrip())
    if stands.finished and not stands.succeeded:
        raise typer.Exit(1)


@app.command()
def logs(
    settings: File,
    overrides: Overrides = None,
    target: Target = None,
    alpha: Alpha = False,
    context: Context = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
) -> None:
    """Print rank 0's log, of its newest pod."""
    read, made = _manifests(settings, overrides, target, alpha)
    name = jobs.job_of(made)["metadata"]["name"]
    with _server_errors():
        where = _cluster(read, context)
        pod = jobs.first_pod(where.pods(name))
        if pod is None:
            raise OSError(f"no pod of {name} with rank 0's log is in {where.namespace}")
        for line in where.log(pod, follow=follow):
            print(line, flush=True)


@app.command()
def delete(
    settings: File,
    overrides: Overrides = None,
    target: Target = None,
    alpha: Alpha = False,
    context: Context = None,
) -> None:
    """End a run, which commits a checkpoint, and remove what was made for it."""
    read, made = _manifests(settings, overrides, target, alpha)
    with _server_errors():
        gone = _cluster(read, context).delete(made)
    for what in gone:
        print(f"deleted {what}")
    if not gone:
        print("nothing of it is there")
