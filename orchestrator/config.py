"""A run's settings: YAML and `key=value`, validated whole before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.kubernetes.settings import Kubernetes

BACKENDS = ("auto", "horovod", "mpi", "mirrored", "single")


class SettingError(ValueError):
    """A setting or an argument of the user's that cannot be right; the launcher exits with 2."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class Run(_Section):
    """Where and how the ranks run.

    Attributes:
        dir: The run directory, a path or any fsspec URL.
        seed: Seeds Python, NumPy and TensorFlow on all ranks; by default one is drawn.
        backend: `auto` (default), `horovod`, `mpi`, `mirrored` or `single`.
        replicas: For `mirrored`: how many; by default all GPUs.
        deterministic: Deterministic TensorFlow operations; false by default.
        resume: `auto` (default): go on from the newest whole checkpoint, or start where there is
            none. `never`: start, where there must be none. Or a URL: go on from this store's
            newest checkpoint, or from this one of its checkpoints.
        init_from: Weights to start with, where nothing is continued: a `.weights.h5` or `.keras`
            file, a store or one of its checkpoints.
        preempt_grace: Seconds from SIGTERM, SIGUSR1 or a notice to the end of the process; 25 by
            default, of the 30 that Kubernetes gives.
        preempt_notice: A file or URL whose being there is a notice; looked at on rank 0.
        timeout: Seconds that a rank waits for the others before all say what they do and end;
            600 by default. Three times that until the first step is made.
    """

    dir: str = Field(min_length=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    backend: Literal["auto", "horovod", "mpi", "mirrored", "single"] = "auto"
    replicas: int | None = Field(None, ge=1)
    deterministic: bool = False
    resume: str = Field("auto", min_length=1)
    init_from: str | None = Field(None, min_length=1)
    preempt_grace: float = Field(25.0, gt=0)
    preempt_notice: str | None = Field(None, min_length=1)
    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)


class Train(_Section):
    """How long and in what steps to train.

    Attributes:
        epochs: At most so many.
        global_batch_size: Samples a step over all ranks together; a multiple of the ranks.
        gradient_buckets: Grouped collectives a step; 1 by default.
        gradient_compression: `fp16` or `bf16`; by default gradients travel as they are.
    """

    epochs: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    gradient_buckets: int = Field(1, ge=1)
    gradient_compression: Literal["fp16", "bf16"] | None = None


class Checkpoint(_Section):
    """Checkpoints of the training state. One is saved at a preemption in any case.

    Attributes:
        url: The store, any fsspec URL; by default `checkpoints` in `run.dir`.
        every_epochs: Save after so many epochs; 1 by default.
        every_steps: Save after so many steps.
        every_minutes: Save after so many minutes.
        keep_last: Keep so many of the newest, 3 by default; with no `keep_` all are kept.
        keep_best: Keep so many of the best by `monitor`.
        keep_every: Keep each whose step is a multiple of this.
        monitor: The metric for `keep_best`; `val_loss` by default.
        mode: Whether less (`min`, the default) or more (`max`) of it is better.
        background: Whether to write while training goes on; true by default.
        when_busy: With a save still being written a new one waits (`wait`, the default) or
            is queued, and replaced by a newer one (`replace`).
    """

    url: str | None = Field(default=None, min_length=1)
    every_epochs: int | None = Field(default=1, ge=1)
    every_steps: int | None = Field(default=None, ge=1)
    every_minutes: float | None = Field(default=None, gt=0)
    keep_last: int | None = Field(default=3, ge=1)
    keep_best: int | None = Field(default=None, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    background: bool = True
    when_busy: Literal["wait", "replace"] = "wait"


class UserFunction(_Section):
    """A function of the user's.

    Attributes:
        factory: `package.module:function`, found from the working directory or installed.
        options: Keyword arguments for it.
    """

    factory: Factory
    options: dict[str, Any] = Field(default_factory=dict)


class Settings(_Section):
    """All settings of a run; frozen.

    Attributes:
        run: Where and how the ranks run.
        train: How long and in what steps.
        data: Gives `(training, validation)`, called with `global_batch_size`, `seed` and options.
        model: Gives a compiled `keras.Model`, called with the options.
        checkpoint: When to save checkpoints, and which to keep.
        callbacks: Callbacks by name with their arguments, in order.
        kubernetes: How to run on a cluster.
    """

    run: Run
    train: Train
    data: UserFunction
    model: UserFunction
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    callbacks: list[dict[str, dict[str, Any]]] = Field(default_factory=list)
    kubernetes: Kubernetes = Field(default_factory=Kubernetes)

    def dump(self) -> str:
        """The settings as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a settings file and lays `key=value` words over it.

    Args:
        path: A YAML file.
        overrides: Words such as `train.epochs=5`; the value is read as YAML.

    Raises:
        SettingError: The file cannot be read, a word is no `key=value`, a key is unknown (the
            nearest right one is named) or a value is not allowed.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise SettingError(
            f"--config {path} must hold settings by name, got {type(tree).__name__}."
        )
    for word in overrides:
        _override(tree, word)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise SettingError("\n".join(lines)) from None


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key.strip("."):
        raise SettingError(f"{word!r} is not a setting. Write key=value, such as train.epochs=5.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingError(f"{key}={text!r} is not a YAML value: {error}") from None
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise SettingError(f"{key}={text}: {section!r} is a value and holds no settings.")
    tree[last] = value


def _explain(problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        given = problem["input"]
        while isinstance(given, dict) and given:
            name, given = next(iter(given.items()))
            key = f"{key}.{name}"
        return f"{key} is not a setting.{nearest(key, known_keys())}"
    if problem["type"] == "missing":
        return f"{key} is not set, and it has no default. Add it to the file or as {key}=VALUE."
    if problem["type"] == "string_pattern_mismatch" and key.endswith("factory"):
        return f"{key}={problem['input']!r} is not allowed: write package.module:function."
    return f"{key}={problem['input']!r} is not allowed: {problem['msg']}."


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that names the right name nearest to a wrong one, and all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Known: {', '.join(names)}."


def known_keys() -> list[str]:
    """Every setting's full name."""
    keys = ["callbacks"]
    for section, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{section}.{name}" for name in kind.model_fields]
    return keys
