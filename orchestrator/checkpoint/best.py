"""How good a saved model was, kept in its own file: whole or not at all, with the model."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from typing import Any

import h5py

from orchestrator import storage

_NAME = "orchestrator.best.json"


@dataclass(frozen=True)
class Best:
    """What a model file was the best by.

    Attributes:
        monitor: The metric's name.
        mode: `"min"` or `"max"`.
        value: Its value.
    """

    monitor: str
    mode: str
    value: float


def remember(path: str, best: Best) -> None:
    """Adds it to a local `.keras` or `.weights.h5` file, which Keras loads as before."""
    text = json.dumps(asdict(best))
    if path.endswith(".keras"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_NAME, text)
    else:
        with h5py.File(path, "a") as file:
            file.attrs[_NAME] = text


def recall(url: str) -> Best | None:
    """Reads it from a file on any fsspec filesystem, a few blocks of it.

    Returns:
        `None` where there is no such file, or nothing of ours in it.
    """
    fs, path = storage.resolve(url)
    if not fs.isfile(path):
        return None
    with fs.open(path, "rb") as file:
        try:
            return Best(**json.loads(_text(path, file)))
        except (KeyError, TypeError, ValueError, zipfile.BadZipFile):
            return None


def _text(path: str, file: Any) -> Any:
    if path.endswith(".keras"):
        with zipfile.ZipFile(file) as archive:
            return archive.read(_NAME)
    try:
        with h5py.File(file, "r") as weights:
            return weights.attrs[_NAME]
    except OSError as error:
        raise ValueError(str(error)) from None  # what h5py says of a file that is no HDF5
