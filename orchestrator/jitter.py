"""Keeps storage's random waits away from Python's global generator, which training draws from.

How often a server fails must not show in a model: its initial weights, its seeds, a user's own
augmentation come from `random`, and so do the waits between two tries of the storage libraries.
"""

from __future__ import annotations

import random
import sys

# Draws apart; a user's `random.seed` does not reach it.
APART = random.Random()
_MODULES = (
    "botocore.retryhandler",
    "botocore.utils",
    "gcsfs.core",
    "gcsfs.retry",
    "google.auth._exponential_backoff",
    "urllib3.util.retry",
)


def keep_apart() -> None:
    """Has those of the libraries that are imported draw their waits from `APART`."""
    for name in _MODULES:
        module = sys.modules.get(name)
        if getattr(module, "random", None) is random:
            vars(module)["random"] = APART
    standard = sys.modules.get("botocore.retries.standard")
    if standard is not None:  # `random.random` is a default of an argument there
        make = standard.ExponentialBackoff.__init__
        make.__defaults__ = tuple(
            APART.random if value == random.random else value for value in make.__defaults__ or ()
        )
