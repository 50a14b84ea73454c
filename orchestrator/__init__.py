"""Keras 3 training on many ranks: the callbacks Keras users know, correct on any number of them.

Importing this package touches no device, no MPI and no logger; `init` does, once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator import callbacks
    from orchestrator.checkpoint.store import CheckpointStore
    from orchestrator.config import SettingError, Settings
    from orchestrator.evaluation import evaluate
    from orchestrator.restoring import restore
    from orchestrator.runtime import Runtime, init
    from orchestrator.sources.npz import NpzFiles
    from orchestrator.sources.tfrecord import TFRecordFiles
    from orchestrator.training import train

__version__ = "0.1.0"

__all__ = [
    "CheckpointStore",
    "NpzFiles",
    "Runtime",
    "SettingError",
    "Settings",
    "TFRecordFiles",
    "callbacks",
    "evaluate",
    "init",
    "restore",
    "train",
]

_HOMES = {
    "CheckpointStore": "checkpoint.store",
    "NpzFiles": "sources.npz",
    "Runtime": "runtime",
    "SettingError": "config",
    "Settings": "config",
    "TFRecordFiles": "sources.tfrecord",
    "evaluate": "evaluation",
    "init": "runtime",
    "restore": "restoring",
    "train": "training",
}


def __getattr__(name: str):
    """Public names are resolved on first use, so that the import itself stays light (PEP 562)."""
    if name == "callbacks":
        return importlib.import_module("orchestrator.callbacks")
    if name in _HOMES:
        return getattr(importlib.import_module(f"orchestrator.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
