"""The record that makes a checkpoint of some files: bytes in, a checked value out. Pure.

`<store>/step-0000000100/manifest.json` is a checkpoint's last write. It names every data file
with its size and SHA-256, and carries a digest of itself, so that neither a torn nor an altered
manifest is taken for one. File names are relative and checked: none leaves the step's prefix.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

FORMAT = 1
NAME = "manifest.json"
_STEP = re.compile(r"step-(\d{10,18})")
_TOKEN = re.compile(r"[0-9a-f]{16}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class InvalidManifestError(ValueError):
    """Bytes that are no manifest, or not that of the step they were found at."""


class UnknownFormatError(InvalidManifestError):
    """A manifest of a newer version of this package: not to be read, and not to be deleted."""


@dataclass(frozen=True)
class File:
    """One data file.

    Attributes:
        name: As it was saved, such as `model.weights.h5`.
        size: In bytes.
        sha256: Of its content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of and what it was made from.

    Attributes:
        step: Optimizer steps done.
        token: Drawn for each attempt to save; the data files lie under it.
        files: The data files.
        epoch: From 0; `None` where there are no epochs.
        metrics: By name; NaN and infinities are kept.
        world_size: Ranks of the run.
        created: Seconds since 1970.
        writer: Who wrote it, for messages: `host:pid`.
        libraries: Versions of what wrote it, by name.
        format: The version of this format.
    """

    step: int
    token: str
    files: tuple[File, ...]
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    world_size: int = 1
    created: float = 0.0
    writer: str = ""
    libraries: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        _check(self)

    def path(self, file: File) -> str:
        """Where a file lies, relative to the step's folder."""
        return f"{self.token}/{file.name}"

    def same_content(self, other: Manifest) -> bool:
        """Whether both name the same step and byte-equal files."""
        return self.step == other.step and set(self.files) == set(other.files)

    def encode(self) -> bytes:
        """The JSON that `decode` reads back."""
        record = asdict(self)
        record["metrics"] = {name: _number(value) for name, value in self.metrics.items()}
        record["digest"] = _digest(record)
        return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def folder(step: int) -> str:
    """A step's folder in the store: `step-0000000100`."""
    return f"step-{step:010d}"


def step_of(name: str) -> int | None:
    """The step whose folder has this name; `None` if it is no step's folder."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and folder(int(match[1])) == name else None


def check_name(name: str) -> str:
    """A file's name, if it stays below the folder it is used in.

    Raises:
        ValueError: It is absolute, has a `..`, an empty or hidden part, or odd characters.
    """
    if not isinstance(name, str) or not all(map(_SEGMENT.fullmatch, name.split("/"))):
        raise ValueError(
            f"{name!r} is no name for a checkpoint's file: use letters, digits and ._+=@- in "
            "parts separated by /, none of them beginning with a dot or a dash."
        )
    return name


def decode(data: bytes, step: int) -> Manifest:
    """A manifest from its bytes.

    Args:
        data: As read from the store.
        step: The step whose folder they were read from.

    Raises:
        InvalidManifestError: They are torn, altered, name a file outside the step's folder, or
            belong to another step; the message says which.
        UnknownFormatError: They were written by a newer version.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidManifestError(f"the manifest is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise InvalidManifestError("the manifest names no format version")
    if record["format"] > FORMAT:
        raise UnknownFormatError(
            f"the manifest has format {record['format']} and this version reads up to {FORMAT}: "
            "update keras-orchestrator"
        )
    if record.pop("digest", None) != _digest(record):
        raise InvalidManifestError("the manifest was altered: it does not match its own digest")
    try:
        files = tuple(File(**file) for file in record.pop("files"))
        metrics = {name: float(value) for name, value in record.pop("metrics").items()}
        manifest = Manifest(files=files, metrics=metrics, **record)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidManifestError(f"the manifest is not valid: {error}") from None
    if manifest.step != step:
        raise InvalidManifestError(f"the manifest is that of step {manifest.step}, not of {step}")
    return manifest


def committed(draft: Manifest, files: tuple[File, ...], created: float) -> Manifest:
    """A draft completed with its files and the time."""
    return replace(draft, files=files, created=created)


def _check(manifest: Manifest) -> None:
    def demand(right: object, what: str) -> None:
        if not right:
            raise ValueError(what)

    step, epoch, size = manifest.step, manifest.epoch, manifest.world_size
    demand(_whole(step) and 0 <= step < 10**18, f"step={step!r}; a step is counted from 0")
    demand(epoch is None or _whole(epoch), f"epoch={epoch!r}; an epoch is a number or None")
    demand(_whole(size) and size > 0, f"world_size={size!r}; a run has at least one rank")
    demand(_TOKEN.fullmatch(str(manifest.token)), f"token={manifest.token!r}")
    names = [check_name(file.name) for file in manifest.files]
    demand(len(set(names)) == len(names), f"a file's name occurs twice: {sorted(names)}")
    for file in manifest.files:
        demand(_whole(file.size) and file.size >= 0, f"{file.name}: size={file.size!r}")
        demand(_SHA256.fullmatch(str(file.sha256)), f"{file.name}: sha256={file.sha256!r}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: float) -> float | str:
    # JSON has neither NaN nor infinities; float() reads their names back.
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _digest(record: Mapping[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
