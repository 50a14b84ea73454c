"""What the settings name: functions of the user's, and callbacks with their arguments."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator import callbacks as ours
from orchestrator import storage
from orchestrator.checkpoint import retention
from orchestrator.config import SettingError, Settings, UserFunction, nearest
from orchestrator.preemption import check_notice

# Done in each run anyway; or given functions or callbacks, which a settings file cannot hold.
_NOT_IN_SETTINGS = (
    *("BackupAndRestore", "BroadcastGlobalVariables", "BroadcastGlobalVariablesCallback"),
    *("GlobalMetrics", "MetricAverage", "MetricAverageCallback", "StoreCheckpoint"),
    *("LambdaCallback", "LearningRateScheduler", "RankAware", "RankZero", "scaled_learning_rate"),
)


@dataclass(frozen=True)
class Parts:
    """What the settings name, found and checked on this rank; does not communicate."""

    data: Callable[..., Any]
    model: Callable[..., Any]
    callbacks: list[Callable[[], Any]]
    checkpoint: Callable[..., ours.StoreCheckpoint]

    @classmethod
    def of(cls, settings: Settings) -> Parts:
        """Imports the user's functions and checks the callbacks' arguments."""
        return cls(
            imported("data.factory", settings.data.factory),
            imported("model.factory", settings.model.factory),
            [_callback(entry, settings.run.dir) for entry in settings.callbacks],
            _checkpoint(settings),
        )


def imported(key: str, path: str) -> Callable[..., Any]:
    """The user's function behind `package.module:function`, or `SettingError`."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SettingError(
            f"{key}={path}: there is no module {error.name!r}. It is looked for in the working "
            f"directory ({os.getcwd()}), beside the script, and among installed packages."
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        names = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module_name
        ]
        raise SettingError(
            f"{key}={path}: {module_name} has no function {name!r}.{nearest(name, names)}"
        )
    return function


def call(section: str, user: UserFunction, function: Callable[..., Any], **given: Any) -> Any:
    """Calls a function of the user's with what is given and its own options."""
    for name in user.options:
        if name in given:
            raise SettingError(
                f"{section}.options.{name} is not allowed: {name} is given to {user.factory} "
                "already, from run.seed and train.global_batch_size."
            )
    arguments = {**given, **user.options}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise SettingError(
            f"{section}.factory={user.factory} is called with "
            f"{', '.join(arguments) or 'no arguments'}, and does not take them: {error}."
        ) from None
    return function(**arguments)


def _callback(entry: dict[str, dict[str, Any]], folder: str) -> Callable[[], Any]:
    """A checked entry of `callbacks`, to be made once the model is there."""
    names = [name for name in ours.__all__ if name not in _NOT_IN_SETTINGS]
    if len(entry) != 1:
        raise SettingError(f"callbacks: each entry is one name with its arguments, got {entry}.")
    ((name, arguments),) = entry.items()
    if name not in names:
        raise SettingError(f"callbacks: there is no {name!r}.{nearest(name, names)}")
    kind = getattr(ours, name)
    allowed = list(inspect.signature(kind.__init__).parameters)[1:]
    for argument in arguments:
        if argument not in allowed:
            raise SettingError(
                f"callbacks: {name} takes no {argument!r}.{nearest(argument, allowed)}"
            )
    arguments = dict(arguments)
    if "missing" in allowed:
        arguments.setdefault("missing", "error")
    if "log_dir" in allowed:
        arguments.setdefault("log_dir", "logs")
    for key in ("filepath", "filename", "log_dir"):
        if key in arguments:
            arguments[key] = storage.join(folder, str(arguments[key]))
    try:
        kind(**arguments)
    except (TypeError, ValueError) as error:
        raise SettingError(f"callbacks: {name}({arguments}): {error}") from None
    return lambda: kind(**arguments)


def store_url(settings: Settings) -> str:
    """Where the training state is saved."""
    return settings.checkpoint.url or storage.join(settings.run.dir, "checkpoints")


def _checkpoint(settings: Settings) -> Callable[..., ours.StoreCheckpoint]:
    """The callback that saves to the store, to be made once it is known what to go on from."""
    asked = settings.checkpoint
    if settings.run.preempt_notice is not None:
        check_notice(settings.run.preempt_notice)
    save: list[retention.Save] = []
    save += [retention.EveryEpochs(asked.every_epochs)] if asked.every_epochs else []
    save += [retention.EverySteps(asked.every_steps)] if asked.every_steps else []
    save += [retention.EveryMinutes(asked.every_minutes)] if asked.every_minutes else []
    keep: list[retention.Keep] = []
    keep += [retention.Last(asked.keep_last)] if asked.keep_last else []
    keep += [retention.Multiples(asked.keep_every)] if asked.keep_every else []
    if asked.keep_best:
        keep.append(retention.Best(asked.monitor, asked.mode, asked.keep_best))
    return functools.partial(
        ours.StoreCheckpoint,
        store_url(settings),
        save=save,
        keep=keep,
        background=asked.background,
        when_busy=asked.when_busy,
        preempt_grace=settings.run.preempt_grace,
        preempt_notice=settings.run.preempt_notice,
        settings=settings.model_dump(),
    )
