"""A run's directory: what the run goes on from there, what it records, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator import restoring, storage
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config import SettingError, Settings
from orchestrator.events import RunDirectory, write_outcome
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
    opened = _open_own(settings, runtime, own)
    if asked != "auto":
        opened = _open_asked(runtime, asked, own, opened)
    if opened is None:
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


def _open_own(settings: Settings, runtime: Runtime, own: str) -> Opened | None:
    try:
        return restoring.open_newest(runtime, CheckpointStore(own))
    except SettingError as error:
        if own.startswith(settings.run.dir):
            raise _no_run_directory(settings, error) from None
        raise


def _open_asked(runtime: Runtime, asked: str, own: str, newest: Opened | None) -> Opened:
    """What `run.resume` names, until the run has checkpoints of its own."""
    url, step = restoring.at(asked)
    if newest is None:
        opened = restoring.open_newest(runtime, CheckpointStore(url), step)
        if opened is None:
            raise SettingError(f"run.resume={asked}: there is no whole checkpoint there.")
        return opened
    is_own = storage.resolve(url) == storage.resolve(own)
    if is_own and step not in (None, newest.checkpoint.step):
        newest.close()
        raise SettingError(
            f"run.resume={asked}: the newest checkpoint there is of step "
            f"{newest.checkpoint.step}, and a run goes on from the newest of its own. Remove "
            "those that came later, or choose another run.dir."
        )
    return newest


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


@contextlib.contextmanager
def recorded_refusal(settings: Settings, runtime: Runtime) -> Iterator[None]:
    """Before a start makes the run's directory: an earlier start's outcome.json is not its own.

    On rank 0 it is removed, and where the settings are refused inside, it says so instead. A
    directory that is not there is not made.
    """
    earlier = runtime.is_root and _forget_outcome(settings.run.dir)
    try:
        yield
    except SettingError as error:
        if earlier:
            with contextlib.suppress(Exception):  # the refusal matters more
                write_outcome(settings.run.dir, 2, f"SettingError: {error}")
        raise


def _forget_outcome(run_dir: str) -> bool:
    """Whether there was one; not, where that cannot be found out: who opens the directory says."""
    with contextlib.suppress(Exception):  # a client's own, too
        fs, path = storage.resolve(storage.join(run_dir, "outcome.json"))
        if fs.exists(path):
            fs.rm_file(path)
            return True
    return False


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
