"""Where a `fit` is in its epochs and its data, and beginning another `fit` there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from keras.src.trainers.epoch_iterator import EpochIterator

from orchestrator.config import SettingError
from orchestrator.sources.position import Position


def calling_fit() -> EpochIterator:
    """What the `fit` that is calling draws its batches from; Keras hands callbacks none of it.

    Raises:
        RuntimeError: There is no `fit` among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        iterator = frame.f_locals.get("epoch_iterator")
        if isinstance(iterator, EpochIterator):
            return iterator
        frame = frame.f_back
    raise RuntimeError("Training state can be saved and continued in model.fit only.")


class Epochs:
    """The epochs of one `fit`, and the data that are read in them.

    Which of the data given to `shard` are trained on is seen: a pass over them begins between
    the beginning of an epoch and its first step.

    Args:
        iterator: Keras's, of that `fit`.
        positions: Of all that was given to `shard`.
    """

    def __init__(self, iterator: EpochIterator, positions: Sequence[Position]) -> None:
        self._iterator = iterator
        self._positions = positions
        self._before: list[int] = []
        self._training: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """Called as an epoch begins."""
        self._before = [position.passes for position in self._positions]

    def step(self) -> None:
        """Called after a training step."""
        now = [position.passes for position in self._positions]
        before = [*self._before, *[0] * (len(now) - len(self._before))]
        self._training |= {i for i, passes in enumerate(now) if passes > before[i]}

    def is_last(self, batch: int) -> bool:
        """Whether a batch, from 0, is known to be an epoch's last."""
        return batch + 1 == self._iterator.num_batches

    def element_spec(self) -> Any:
        """One replica's batch, as `tf.TensorSpec`s."""
        spec = self._iterator._distributed_dataset.element_spec
        return tf.nest.map_structure(lambda one: getattr(one, "_value_specs", [one])[0], spec)

    def state(self) -> dict[str, Any]:
        """Where the data are: passes begun, those trained on, batches in a pass if known."""
        return {
            "passes": [position.passes for position in self._positions],
            "trained_on": sorted(self._training),
            "batches": self._iterator._num_batches,
        }

    def resume(self, state: dict[str, Any], epoch: int, batch: int) -> None:
        """Has the coming epoch begin at a batch, and the data as after the epochs before.

        Data that were shuffled before `shard`, or given to `fit` without it, are opened once for
        each pass before, and the batches before this one are read. Those of arrays and files that
        `shard` shuffled are not read.

        Args:
            state: As `state` gave it.
            epoch: The coming epoch, from 0.
            batch: The first batch of it that is to be trained on, from 0.

        Raises:
            SettingError: There are not as many data as there were.
        """
        if len(state["passes"]) != len(self._positions):
            raise SettingError(
                f"shard() was called {len(self._positions)} times so far, and in the run that is "
                f"to be continued {len(state['passes'])} times. Give it the same data, or start "
                "afresh."
            )
        one_epoch = self._iterator.steps_per_epoch
        one_pass = one_epoch is not None
        self._training = set(state["trained_on"])
        for index, position in enumerate(self._positions):
            position.passes, position.skip = state["passes"][index], 0
            if index in self._training and one_epoch is not None:
                position.passes, position.skip = 0, epoch * int(one_epoch) + batch
            elif index in self._training and batch:
                position.passes, position.skip = position.passes - 1, batch
        self.begin()
        own = self._iterator._enumerate_iterator

        def enumerate_iterator() -> Iterator[Any]:
            self._iterator._enumerate_iterator = own  # in later epochs
            for _ in range(epoch):
                self._pass_over(own(), read=one_pass)
                self._iterator._num_batches = state["batches"]
            for begin, end, batches in own():
                if begin >= batch:
                    yield begin, end, batches
                else:
                    _read(batches, end + 1 - begin, begin)

        self._iterator._enumerate_iterator = enumerate_iterator

    def _pass_over(self, batches: Iterator[Any], *, read: bool) -> None:
        """One epoch of which nothing is trained on."""
        for begin, end, iterator in batches:
            if read:
                _read(iterator, end + 1 - begin, begin)
            elif self._iterator._num_batches is None:
                return  # where their number is not known there is no end


def _read(iterator: Any, number: int, first: int) -> None:
    for index in range(number):
        if next(iterator, None) is None:
            raise SettingError(
                f"The data end after {first + index} batches, before the one at which training is "
                "to go on. Give the data of the run that is continued, or start afresh."
            )
