"""A run's directory: what the run goes on from there, what it records, and how it ended."""

from __future__ import annotations

from orchestrator import restoring, storage
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError, Settings
from orchestrator.events import RunDirectory
from orchestrator.faults import ignore_signals, set_aside
from orchestrator.parts import store_url
from orchestrator.restoring import Opened
from orchestrator.resume.settings import compare
from orchestrator.runtime import Runtime


def open_checkpoint(settings: Settings, runtime: Runtime) -> Opened | None:
    """What the run goes on from, its settings compared and its seed taken up; by all ranks."""
    own, asked = store_url(settings), settings.run.resume
    if asked == "never":
        runtime.on_root(lambda: _refuse_checkpoints(own))
        return None
    url, step = (own, None) if asked == "auto" else restoring.at(asked)
    try:
        opened = restoring.open_newest(runtime, CheckpointStore(url), step)
    except SettingError as error:
        if url.startswith(settings.run.dir):
            raise _no_run_directory(settings, error) from None
        raise
    if opened is None:
        if asked != "auto":
            raise SettingError(f"run.resume={asked}: there is no whole checkpoint there.")
        return None
    state = opened.state
    if state is None or state["settings"] is None:
        raise SettingError(
            f"{opened.checkpoint.url} holds weights, and no state of a training that could be "
            "continued. Start from its weights with run.init_from, in another run.dir."
        )
    changes = compare(state["settings"], settings.model_dump())
    for change in changes:
        runtime.say(f"Changed since the run was begun: {change}")
    if any(change.startswith(("train.epochs", "callbacks")) for change in changes):
        state["stopped"] = False  # by what has been changed now, perhaps
    runtime.seed = state["seed"]
    return opened


def _refuse_checkpoints(url: str) -> None:
    found = CheckpointStore(url).list()
    if found:
        raise SettingError(
            f"run.resume=never, and {url} holds {len(found)} checkpoints already, the newest of "
            f"step {found[-1].step}. Choose another run.dir, or remove them first."
        )


def open_directory(settings: Settings, runtime: Runtime) -> RunDirectory | None:
    """Makes the run directory, on rank 0."""
    directories: list[RunDirectory] = []

    def make() -> None:
        try:
            storage.write_text(storage.join(settings.run.dir, "config.yaml"), settings.dump())
            directories.append(RunDirectory(settings.run.dir, keep=settings.run.resume != "never"))
            set_aside(settings.run.dir)
        except (OSError, ValueError, ImportError) as error:
            raise _no_run_directory(settings, error) from None

    runtime.on_root(make)
    faults = runtime.faults
    if faults is not None:
        faults.record_in(settings.run.dir)
        faults.events = directories[0] if directories else None
    if directories:
        runtime.events = directories[0]
        return directories[0]
    return None


def _no_run_directory(settings: Settings, error: Exception) -> SettingError:
    return SettingError(
        f"run.dir={settings.run.dir} cannot be written: {error}. Set run.dir to a folder or URL "
        "that this user may write to."
    )


def record_failure(runtime: Runtime, directory: RunDirectory | None, error: Exception) -> None:
    """Writes outcome.json, on rank 0 and on the first that fails; does not communicate."""
    faults = runtime.faults
    if faults is not None:
        ignore_signals()
        if faults.is_recorded:
            return
    if directory is not None:
        reason = f"{type(error).__name__}: {error}" if faults is None else faults.reason(error)
        directory.outcome(2 if isinstance(error, SettingError) else 1, reason, None, None)
    elif faults is not None:
        faults.record(error)
