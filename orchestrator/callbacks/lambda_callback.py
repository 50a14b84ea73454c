"""`LambdaCallback` on many ranks."""

from __future__ import annotations

import keras

from orchestrator.callbacks.rank_aware import RankAware


class LambdaCallback(RankAware, keras.callbacks.LambdaCallback):
    """Calls functions of yours on every rank, with global logs at epoch ends; Keras's parameters.

    It does not communicate. For functions that write or print, put it into `RankZero`.
    """
