"""A guard against replicas that drift apart without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from orchestrator import decisions, weights
from orchestrator import runtime as runtimes
from orchestrator.callbacks.rates import learning_rates
from orchestrator.config import SettingError
from orchestrator.steps import DivergedError


class ConsistencyGuard(keras.callbacks.Callback):
    """Stops all ranks when one holds other weights, learning rate or step than the rest.

    On all ranks. A check makes one number of each weight and optimizer variable, on its device,
    and compares them in one small allreduce (8 bytes a variable and rank). A single flipped bit
    changes the number. Moving statistics and gradients accumulated since the last update are each
    rank's own and not compared.

    Args:
        check_freq: `"epoch"` (default), or a number of batches between checks.

    Raises:
        DivergedError: On every rank: which variable differs first, and on which rank(s).
    """

    def __init__(self, check_freq: str | int = "epoch") -> None:
        super().__init__()
        if check_freq != "epoch" and (not isinstance(check_freq, int) or check_freq < 1):
            raise SettingError(
                f"ConsistencyGuard's check_freq={check_freq!r} is not allowed: 'epoch', or a "
                "number of batches, 1 or more."
            )
        self.check_freq = check_freq
        self._batches = decisions.BatchCount()

    def set_model(self, model: keras.Model) -> None:
        """Readies the model's steps."""
        super().set_model(model)
        self._runtime = runtimes.current()
        self._runtime.prepare(model)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Checks every `check_freq` batches."""
        if self.check_freq != "epoch":
            self._batches, due = decisions.batches_due(self._batches, batch, int(self.check_freq))
            if due:
                self.check()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Checks at the end of each epoch, where that is asked for."""
        if self.check_freq == "epoch":
            self.check(epoch)

    def get_state(self) -> dict[str, Any]:
        """The batches counted."""
        return self._batches._asdict()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate."""
        self._batches = decisions.BatchCount(**state)

    def check(self, epoch: int | None = None) -> None:
        """Compares now; called by all ranks. One allreduce."""
        communicator = self._runtime.communicator
        if communicator.size == 1:
            return
        variables = weights.shared_variables(self.model)
        step = int(self.model.optimizer.iterations.numpy())
        rates = learning_rates(self.model)
        bits = np.array(list(rates.values()), np.float64).view(np.int64)
        mine = np.array([*weights.fingerprints(variables), *bits, step])
        table = np.zeros((communicator.size, len(mine)), np.int64)
        table[communicator.rank] = mine
        table = communicator.allreduce(table)
        names = [
            *(v.path for v in variables),
            *(name.replace("learning_rate", "learning rate") for name in rates),
            "step",
        ]
        for name, column in zip(names, table.T, strict=True):
            usual, _ = Counter(column.tolist()).most_common(1)[0]
            differing = np.flatnonzero(column != usual).tolist()
            if differing:
                self._stop(name, differing, epoch, step)

    def _stop(self, name: str, ranks: list[int], epoch: int | None, step: int) -> None:
        self._runtime.events.emit("fault", epoch=epoch, step=step, rank=ranks[0], variable=name)
        raise DivergedError(
            f"The ranks no longer hold the same state: {name!r} on rank(s) "
            f"{', '.join(map(str, ranks))} is not that of the others, at step {step}. Look for "
            "weights changed on one rank alone, for unlike hardware or libraries, and for faulty "
            "memory; then start again from the last checkpoint before this step."
        )
