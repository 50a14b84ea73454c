"""`SwapEMAWeights` on many ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from orchestrator.callbacks.rank_aware import RankAware


class SwapEMAWeights(RankAware, keras.callbacks.SwapEMAWeights):
    """Evaluates with the optimizer's averaged weights; Keras's parameters and defaults.

    On all ranks, which hold the same averages; it does not communicate. Unlike Keras's:
    swapping back gives the same bits (Keras adds and subtracts); with `swap_on_epoch` the
    averages are the model's at the end whoever ends training, and a run that is continued has
    the weights it was training, not their averages; weights are swapped back after `predict`.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Sees to it that averages in the model's place are not taken for the weights."""
        self._ema_weights_in_model = False
        optimizer: Any = self.model.optimizer
        self._as_it_was(optimizer)
        usual = optimizer.finalize_variable_values

        def finalize(variables: Sequence[Any]) -> None:
            if self._ema_weights_in_model:
                self._finalize_ema_values()
                self._ema_weights_in_model = False
            usual(variables)

        # Keras calls it when the last epoch is over; only then is it known which one that was.
        optimizer.finalize_variable_values = finalize

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Leaves the optimizer as it was."""
        self._as_it_was(self.model.optimizer)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Swaps, with `swap_on_epoch`."""
        if self.swap_on_epoch and not self._ema_weights_in_model:
            self._swap_variables()
            self._ema_weights_in_model = True

    def on_predict_end(self, logs: dict[str, Any] | None = None) -> None:
        """Swaps back."""
        self.on_test_end(logs)

    def get_state(self) -> dict[str, Any]:
        """Which of the two are in the model's place."""
        return {"in_model": self._ema_weights_in_model}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; does not communicate."""
        self._ema_weights_in_model = state["in_model"]

    def _tf_swap_variables(self, optimizer: Any) -> None:
        pairs = zip(
            optimizer._trainable_variables,
            optimizer._model_variables_moving_average,
            strict=True,
        )
        for variable, average in pairs:
            optimizer._distribution_strategy.extended.update(
                getattr(variable, "value", variable),
                _swap,
                args=(getattr(average, "value", average),),
            )

    @staticmethod
    def _as_it_was(optimizer: Any) -> None:
        vars(optimizer).pop("finalize_variable_values", None)


def _swap(variable: Any, average: Any) -> None:
    before = tf.identity(variable)
    variable.assign(average)
    average.assign(before)
