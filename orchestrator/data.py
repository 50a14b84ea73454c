"""This rank's part of every global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import keras
import tensorflow as tf

from orchestrator.communicators.base import Communicator
from orchestrator.sources.arrays import Arrays
from orchestrator.sources.base import Files, Source
from orchestrator.sources.batches import (
    Batches,
    DatasetBatches,
    IteratorBatches,
    PyDatasetBatches,
)
from orchestrator.sources.indexed import Orders, own_samples
from orchestrator.sources.position import Position

_Optional: Any = tf.experimental.Optional


def shard(
    data: Any,
    communicator: Communicator,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    validation_split: float | None = None,
    steps: int | None = None,
    position: Position | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Any:
    """Gives this rank its part of every global batch; called by all ranks.

    Every rank gets as many batches as there are global ones, so all make the same number of
    steps; a part may be empty, and every sample is in exactly one. The ranks compare lengths and
    element types once, here (one collective, small but for the index of files).

    Args:
        data: One of

            - arrays of one length in any nesting, `(x, y)` for instance: NumPy, tensors, pandas,
              or on disk and read by rows (`np.memmap`, `h5py.Dataset`);
            - `TFRecordFiles` or `NpzFiles`;
            - a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator, batched to the
              **global** batch size, with the same elements in the same order on all ranks
              (seeded shuffles, which `init` sees to).
        communicator: The ranks.
        batch_size: The global batch size; for arrays and files only, and needed there.
        shuffle: For arrays, files and a PyDataset (whose batches are shuffled, not its samples):
            a new global order each pass, the same whatever the number of ranks. False by default.
        seed: The order's seed.
        validation_split: For arrays and files only: the fraction of the samples, between 0 and 1,
            that is for validation: the last ones, before any shuffling, as in Keras. `None` (the
            default) splits nothing.
        steps: Global batches in one pass, where the data does not say (a generator, a filtered
            dataset): the pass ends after so many, and a rank that has fewer raises instead of
            leaving the others to wait. By default what the data says, if it does.
        position: Kept while passes are read, of arrays, files and a PyDataset, so that a resumed
            run can go on where another stopped; by default nobody asks.
        say: Called with a line for the user where every rank reads everything.

    Returns:
        A `tf.data.Dataset` of this rank's parts, or with `validation_split` a pair of them,
        (training, validation). Of arrays and files each rank reads and copies only its own
        samples; a batched dataset is read whole on every rank and cut.

    Raises:
        ValueError: On every rank: elements are not batched, arrays differ in length, an argument
            is missing or out of place, or the ranks' data are not alike.
        RuntimeError: On the other ranks, where one could not open its data for another reason.
    """
    rank, size = communicator.rank, communicator.size
    asked = _Asked(batch_size, shuffle, seed, validation_split, steps, position or Position())
    source = _open(data, asked, communicator)
    if source.note and size > 1:
        say(source.note)
    if isinstance(source, Batches):
        return _planned(source, asked, rank, size)
    return _indexed(source, asked, rank, size)


@dataclass(frozen=True)
class _Asked:
    batch_size: int | None
    shuffle: bool
    seed: int
    validation_split: float | None
    steps: int | None
    position: Position


def _open(data: Any, asked: _Asked, communicator: Communicator) -> Source | Batches:
    """The data as one of our sources, compared between the ranks."""
    source, signature, found, error = None, "", None, None
    try:
        source = _source(data, asked)
        signature = _signature(source, asked)
        if isinstance(source, Files):
            found = source.scan(communicator.rank, communicator.size)
    except Exception as caught:  # noqa: BLE001 - raised below, once all ranks know
        error = caught
    problem = None if error is None else (isinstance(error, ValueError), str(error))
    everyone = communicator.allgather_object((signature, problem, found))
    _compare(everyone, error)
    if isinstance(source, Files):
        source = source.join([found for _, _, found in everyone])
        _check_steps(asked, _batches(len(source), asked))
    return cast(Any, source)


def _source(data: Any, asked: _Asked) -> Source | Batches | Files:
    if isinstance(data, tf.data.Dataset):
        if asked.batch_size is not None or asked.shuffle:
            raise ValueError(
                "shard() takes batch_size and shuffle for arrays only; a tf.data.Dataset is "
                "shuffled and batched to the global batch size before it is passed in."
            )
        return DatasetBatches(data)
    if isinstance(data, keras.utils.PyDataset):
        return PyDatasetBatches(data, Orders(asked.seed) if asked.shuffle else None, asked.position)
    if isinstance(data, Iterator):
        if asked.shuffle:
            raise ValueError("shard() can't shuffle a generator; it gives its own order.")
        return IteratorBatches(data)
    return data if isinstance(data, Files) else Arrays(data)


def _signature(source: Source | Batches | Files, asked: _Asked) -> str:
    """Checks one rank's arguments and says in words what must be alike on all ranks."""
    size, split, steps = asked.batch_size, asked.validation_split, asked.steps
    if steps is not None and steps < 1:
        raise ValueError(f"shard(steps={steps}) is not allowed: 1 or more batches.")
    if isinstance(source, Batches):
        if size is not None or split is not None:
            raise ValueError(
                "shard() takes batch_size and validation_split for arrays and files only; "
                f"{source.describe()} are batches already. Got batch_size={size}, "
                f"validation_split={split}."
            )
        _check_steps(asked, source.length)
        number = {None: "an unknown number of", -1: "endless"}.get(source.length, source.length)
        return f"{number} global batches of {source.describe()}, {steps} planned"
    if size is None or size < 1:
        raise ValueError(
            "shard() of arrays needs the global batch size: shard(arrays, batch_size=64). "
            f"Got batch_size={size}."
        )
    if split is not None and not 0 < split < 1:
        raise ValueError(f"shard(validation_split={split}) is not allowed: between 0 and 1.")
    options = f"batches of {size}, shuffle={asked.shuffle}, validation_split={split}"
    if isinstance(source, Files):
        return f"{source.describe()} in {options}, {steps} planned"
    length = len(source)
    _check_steps(asked, _batches(length, asked))
    return f"{length} samples of {source.describe()} in {options}, {steps} planned"


def _check_steps(asked: _Asked, known: int | None) -> None:
    if asked.steps is not None and known not in (None, -1) and asked.steps > cast(int, known):
        raise ValueError(
            f"shard(steps={asked.steps}) is not allowed: the data has {known} batches."
        )


def _compare(everyone: list[tuple[str, Any, Any]], own: Exception | None) -> None:
    for rank, (_, problem, _) in enumerate(everyone):
        if problem is not None:
            is_value, text = problem
            if own is not None:
                raise own
            if is_value:
                raise ValueError(text)
            raise RuntimeError(f"Rank {rank} could not open its data: {text}")
    for rank, (signature, _, _) in enumerate(everyone):
        if signature != everyone[0][0]:
            raise ValueError(
                "The ranks' data are not alike: every rank must pass the same global data to "
                f"shard(). Rank 0 has {everyone[0][0]}; rank {rank} has {signature}."
            )


def _planned(batches: Batches, asked: _Asked, rank: int, size: int) -> tf.data.Dataset:
    """A rank's parts; where their number is known, one that ends before raises.

    Keras would end the epoch on that rank, and the others would wait for it.
    """
    dataset = batches.parts(rank, size)
    planned = batches.length if asked.steps is None else asked.steps
    if planned in (None, -1):
        return dataset
    if size == 1 and int(dataset.cardinality()) == planned:
        return dataset
    spec = dataset.element_spec
    packed = dataset.map(lambda *e: _Optional.from_value(_element(spec, e)))
    nothing = tf.data.Dataset.from_tensors(_Optional.empty(spec)).repeat()

    def check(number: tf.Tensor, batch: Any) -> Any:
        message = tf.strings.format(
            f"The data of rank {rank} ended early: {planned} global batches were planned for one "
            "pass and {} came. Every rank must give as many; the others would wait for this one.",
            number,
        )
        with tf.control_dependencies([tf.debugging.Assert(batch.has_value(), [message])]):
            return tf.nest.map_structure(tf.identity, batch.get_value())

    # Not in parallel: that would read ahead, and a generator's batches would be lost.
    return packed.concatenate(nothing).take(planned).enumerate().map(check)


def _element(spec: Any, arguments: tuple[Any, ...]) -> Any:
    """What a dataset hands to a mapped function as one element again."""
    return arguments if isinstance(spec, tuple) else arguments[0]


def _for_training(length: int, asked: _Asked) -> int:
    """How many samples are left where the last ones are for validation; rounded as in Keras."""
    return math.floor(length * (1.0 - (asked.validation_split or 0.0)))


def _batches(length: int, asked: _Asked) -> int:
    return -(-_for_training(length, asked) // cast(int, asked.batch_size))


def _indexed(source: Source, asked: _Asked, rank: int, size: int) -> Any:
    length, batch_size = len(source), cast(int, asked.batch_size)
    orders = Orders(asked.seed) if asked.shuffle else None
    middle = _for_training(length, asked)
    if asked.validation_split is not None and middle in (0, length):
        raise ValueError(
            f"shard(validation_split={asked.validation_split}) of {length} samples leaves none "
            "for training or none for validation. Give more data or another fraction."
        )
    training = own_samples(source, range(middle), batch_size, orders, rank, size, asked.position)
    if asked.steps is not None:
        training = training.take(asked.steps)
    if asked.validation_split is None:
        return training
    return training, own_samples(source, range(middle, length), batch_size, None, rank, size)
