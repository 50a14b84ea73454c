"""The `orchestrator` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from orchestrator import cli_kubernetes
from orchestrator.checkpoint.retention import Best, Keep, Last, Mode, Multiples
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError
from orchestrator.launching.hosts import parse as parse_hosts
from orchestrator.launching.hosts import read as read_hosts
from orchestrator.launching.launch import GRACE, Launch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Distributed training of Keras models: what goes with it on the command line.",
)
checkpoints = typer.Typer(no_args_is_help=True, help="Look after the checkpoints at a URL.")
app.add_typer(checkpoints, name="checkpoints")
app.add_typer(cli_kubernetes.app, name="k8s")

Url = Annotated[str, typer.Argument(help="Where the checkpoints are: a folder or any fsspec URL.")]


@app.callback()
def _main() -> None:
    pass


@checkpoints.command()
def ls(url: Url) -> None:
    """List the committed checkpoints, oldest first."""
    found = CheckpointStore(url).list()
    table = Table("step", "epoch", "MiB", "ranks", "metrics")
    for one in found:
        size = sum(file.size for file in one.manifest.files) / 2**20
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in one.metrics.items())
        epoch = "" if one.epoch is None else str(one.epoch)
        table.add_row(str(one.step), epoch, f"{size:.1f}", str(one.manifest.world_size), metrics)
    _show(table, len(found), url)


@checkpoints.command()
def verify(url: Url) -> None:
    """Read and hash every byte; ends with 1 if any checkpoint is broken."""
    verdicts = CheckpointStore(url).verify()
    table = Table("step", "")
    for one in verdicts:
        table.add_row(str(one.step), one.problem or "whole")
    _show(table, len(verdicts), url)
    if any(one.problem for one in verdicts):
        raise typer.Exit(1)


@checkpoints.command()
def prune(
    url: Url,
    last: Annotated[int | None, typer.Option(min=1, help="Keep so many of the newest.")] = None,
    best: Annotated[str | None, typer.Option(help="Keep the best by this metric.")] = None,
    mode: Annotated[Mode, typer.Option(help="Whether less or more of it is better.")] = "min",
    every: Annotated[int | None, typer.Option(min=1, help="Keep each multiple of steps.")] = None,
    older_than: Annotated[
        float, typer.Option(min=0, help="Leave what is unfinished and younger, in hours.")
    ] = 24.0,
) -> None:
    """Remove what dead writers left, and checkpoints that none of the given options keeps.

    The newest whole checkpoint always stays. Without options all checkpoints stay.
    """
    keep: list[Keep] = [Last(last)] if last else []
    keep += [Best(best, mode)] if best else []
    keep += [Multiples(every)] if every else []
    pruned = CheckpointStore(url).prune(keep, older_than=3600 * older_than)
    print(f"{url}: removed {len(pruned.steps)} checkpoints, {len(pruned.leftovers)} leftovers")
    for step in pruned.steps:
        print(f"  step {step}")
    for leftover in pruned.leftovers:
        print(f"  {leftover}")


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    command: Annotated[list[str] | None, typer.Argument(help="What each rank runs.")] = None,
    size: Annotated[
        int, typer.Option("-np", "--num-proc", show_default=False, help="How many ranks.")
    ] = 0,
    mpi: Annotated[bool, typer.Option("--mpi", help="By mpiexec, not horovodrun.")] = False,
    grace: Annotated[
        float, typer.Option(help="Seconds from a signal to the end of what is still running.")
    ] = GRACE,
    restart: Annotated[
        int, typer.Option(help="How often to start again a job that ended preempted (75).")
    ] = 0,
    hosts: Annotated[str | None, typer.Option("-H", "--hosts", help="node1:4,node2:4")] = None,
    hostfile: Annotated[str | None, typer.Option(help="A line each: node1 slots=4.")] = None,
    launcher_args: Annotated[str, typer.Option(help="More options for the launcher.")] = "",
) -> None:
    """Start ranks by horovodrun or mpiexec, with time to checkpoint and their own exit code.

    SIGTERM, SIGUSR1 and SIGINT reach every rank once, on every host; a second one ends all.

    Ends with 75 (preempted, start it again) if that is how every rank that failed did.
    """
    if hosts is not None and hostfile is not None:
        raise SettingError("-H and --hostfile both say where to start ranks: give one of them.")
    where = parse_hosts(hosts) if hosts is not None else []
    where = read_hosts(hostfile) if hostfile is not None else where
    job = Launch(
        size=size,
        command=command or [],
        mpi=mpi,
        grace=grace,
        restarts=restart,
        hosts=where,
        launcher_args=launcher_args,
    )
    raise typer.Exit(job.run())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, on one line.")] = False,
    storage: Annotated[
        str | None, typer.Option(help="A URL or folder where writing and reading is tried.")
    ] = None,
    backend: Annotated[str, typer.Option(help="As run.backend.")] = "auto",
    folder: Annotated[str, typer.Option("--dir", help="The folder whose disk is looked at.")] = ".",
) -> None:
    """See what is off with the ranks, their hosts and what is between them; under any launcher.

    Rank 0 prints. Ends with 1 if something is wrong, on all ranks.
    """
    # TensorFlow takes seconds to import, and says more than anybody wants to read here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from orchestrator.doctor import examine, show

    report = examine.examine(backend, storage, folder)
    show.tell(report, as_json=as_json)
    raise typer.Exit(report.exit_code)


def _show(table: Table, rows: int, url: str) -> None:
    if rows:
        Console().print(table)
    else:
        print(f"{url}: no checkpoints")


def main() -> None:
    """Runs the command; bad input ends it with 2 and one line."""
    try:
        app()
    except SettingError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        sys.exit(1)
