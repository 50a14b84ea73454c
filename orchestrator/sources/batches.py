"""Sources that give whole global batches: every rank asks for all of them and keeps its part."""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np
import tensorflow as tf

from orchestrator.sources.base import part
from orchestrator.sources.indexed import Orders
from orchestrator.sources.position import Position


@runtime_checkable
class Batches(Protocol):
    """Global batches, all of which every rank must ask for.

    Attributes:
        note: What every rank reads, in words for the user.
        length: The number of batches in a pass; `None` where it is not known, -1 without end.
    """

    note: str | None
    length: int | None

    def describe(self) -> str:
        """A batch's dtypes and shapes: what must be alike on all ranks."""
        ...

    def parts(self, rank: int, size: int) -> tf.data.Dataset:
        """A rank's part of every batch."""
        ...


class DatasetBatches:
    """A `tf.data.Dataset` batched to the global batch size.

    Raises:
        ValueError: Its elements are no batches.
    """

    note: str | None = (
        "Every rank reads the whole tf.data.Dataset and keeps its part of each batch. To read "
        "only a rank's own samples pass arrays, orchestrator.TFRecordFiles or NpzFiles."
    )

    def __init__(self, dataset: tf.data.Dataset) -> None:
        self._dataset = dataset
        shapes = [leaf.shape for leaf in tf.nest.flatten(dataset.element_spec)]
        lengths = {shape[0] for shape in shapes if shape.rank} - {None}
        if len(lengths) > 1 or any(shape.rank == 0 for shape in shapes):
            raise ValueError(
                "shard() takes a dataset batched to the global batch size, got elements "
                f"{dataset.element_spec}. Call dataset.batch(global_batch_size) first."
            )
        cardinality = int(dataset.cardinality())
        self.length: int | None = (
            None if cardinality == tf.data.UNKNOWN_CARDINALITY else cardinality
        )

    def describe(self) -> str:
        """A batch's dtypes and shapes."""
        return str(self._dataset.element_spec)

    def parts(self, rank: int, size: int) -> tf.data.Dataset:
        """A rank's part of every batch."""
        dataset = self._dataset

        def own(*batch: Any) -> Any:
            # A dataset of dicts or single tensors hands each over as one argument.
            element: Any = batch if isinstance(dataset.element_spec, tuple) else batch[0]
            first = tf.nest.flatten(element)[0]
            length = first.shape[0]
            begin, count = part(tf.shape(first)[0] if length is None else length, rank, size)
            return tf.nest.map_structure(lambda leaf: leaf[begin : begin + count], element)

        return dataset if size == 1 else dataset.map(own, num_parallel_calls=tf.data.AUTOTUNE)


class PyDatasetBatches:
    """The batches of a `keras.utils.PyDataset`, fetched by `workers` threads.

    `on_epoch_begin` and `on_epoch_end` are called around the fetching of each pass, and once for
    each pass that a resumed run leaves out.

    Args:
        data: Batched to the global batch size.
        orders: Gives each pass the order of its batches; `None` for the dataset's own.
        position: Asked as each pass begins.

    Raises:
        ValueError: It has no batch, or no end and `orders` is given.
    """

    note: str | None = (
        "Every rank asks the PyDataset for every batch and keeps its part. To read only a rank's "
        "own samples pass arrays, orchestrator.TFRecordFiles or NpzFiles."
    )

    def __init__(self, data: Any, orders: Orders | None, position: Position) -> None:
        self._data, self._orders, self._position = data, orders, position
        self._passes = 0
        batches = data.num_batches
        if batches == 0 or (batches is None and orders is not None):
            raise ValueError(
                "shard() takes a PyDataset of one or more batches, and shuffle=True only where "
                f"their number is known; got num_batches={batches}."
            )
        self.length: int | None = -1 if batches is None else int(batches)
        looked_at = range(2 if batches is None else min(2, batches))
        self._spec = _spec([_standard(data[number]) for number in looked_at])

    def describe(self) -> str:
        """A batch's dtypes and shapes."""
        return str(self._spec)

    def parts(self, rank: int, size: int) -> tf.data.Dataset:
        """A rank's part of every batch."""
        dataset = _python_parts(self._pass, self._spec, rank, size)
        return dataset.prefetch(tf.data.AUTOTUNE)

    def _pass(self) -> Iterator[Any]:
        batches = self._data.num_batches
        number, first = self._position.begin(batches)
        while self._passes < number:
            self._data.on_epoch_begin()
            self._data.on_epoch_end()
            self._passes += 1
        self._passes += 1
        self._data.on_epoch_begin()
        for _ in range(first):
            yield self._nothing()
        if first == batches:
            self._data.on_epoch_end()
            return
        for more, batch in self._fetch(self._numbers(number, first)):
            if not more:
                # Nobody asks for more after the last batch, so this cannot wait until then.
                self._data.on_epoch_end()
            yield _standard(batch)

    def _nothing(self) -> Any:
        """A batch without samples."""
        return tf.nest.map_structure(
            lambda spec: np.zeros([size or 0 for size in spec.shape], spec.dtype.as_numpy_dtype),
            self._spec,
        )

    def _numbers(self, number: int, first: int) -> Iterator[int]:
        batches = self._data.num_batches
        if batches is None:
            return itertools.count(first)
        if self._orders is None:
            return iter(range(first, batches))
        return iter(self._orders(batches, number)[first:].tolist())

    def _fetch(self, numbers: Iterator[int]) -> Iterator[tuple[bool, Any]]:
        """Whether there are more, and the batch; some are fetched ahead."""
        ahead = self._data.max_queue_size if self._data.workers > 1 else 1
        waiting: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(max(1, self._data.workers)) as threads:
            try:
                for number in numbers:
                    waiting.append(threads.submit(self._data.__getitem__, number))
                    if len(waiting) > ahead:
                        yield True, waiting.popleft().result()
                while waiting:
                    batch = waiting.popleft().result()
                    yield bool(waiting), batch
            finally:
                for future in waiting:
                    future.cancel()


class IteratorBatches:
    """The batches of a generator or another iterator: one pass, which may have no end.

    A second pass goes on where the first one stopped. Nothing is read ahead: what a pass that is
    given up had read ahead would be lost, and not the same batches on every rank.

    Raises:
        ValueError: It gives no batch.
    """

    note: str | None = (
        "Every rank takes every batch from its generator and keeps its part. To read only a "
        "rank's own samples pass arrays, orchestrator.TFRecordFiles or NpzFiles."
    )
    length: int | None = None

    def __init__(self, iterator: Iterator[Any]) -> None:
        first = [_standard(batch) for batch in itertools.islice(iterator, 2)]
        if not first:
            raise ValueError("shard() got a generator that gives no batch.")
        self._spec = _spec(first)
        self._batches = itertools.chain(first, map(_standard, iterator))

    def describe(self) -> str:
        """A batch's dtypes and shapes."""
        return str(self._spec)

    def parts(self, rank: int, size: int) -> tf.data.Dataset:
        """A rank's part of every batch that is left."""
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        options.experimental_optimization.map_parallelization = False
        return _python_parts(self._pass, self._spec, rank, size).with_options(options)

    def _pass(self) -> Iterator[Any]:
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError(
                "The generator given to shard() is used up, and one more pass over it was begun. "
                "Give model.fit steps_per_epoch, and the generator enough batches for all epochs; "
                "or use a keras.utils.PyDataset, which can be read again."
            )
        yield batch
        yield from self._batches


def _python_parts(
    batches: Callable[[], Iterator[Any]], spec: Any, rank: int, size: int
) -> tf.data.Dataset:
    """A rank's part of every batch; no more than the part becomes tensors."""

    def own_parts() -> Iterator[Any]:
        for batch in batches():
            lengths = {leaf.shape[0] for leaf in tf.nest.flatten(batch)}
            if len(lengths) != 1:
                raise ValueError(f"A batch has arrays of different lengths: {sorted(lengths)}.")
            begin, count = part(lengths.pop(), rank, size)
            own = slice(begin, begin + count)
            yield tf.nest.map_structure(operator.itemgetter(own), batch)

    return tf.data.Dataset.from_generator(own_parts, output_signature=spec)


def _standard(batch: Any) -> Any:
    """A batch as tuples and dicts of NumPy arrays."""
    batch = keras.tree.lists_to_tuples(batch)
    while isinstance(batch, tuple) and len(batch) > 1 and batch[-1] is None:
        batch = batch[:-1]
    return tf.nest.map_structure(np.asarray, batch)


def _spec(batches: Sequence[Any]) -> Any:
    """What all batches look like, given the first ones; their length is left open."""

    def of_leaf(*leaves: np.ndarray) -> tf.TensorSpec:
        first = leaves[0]
        if first.ndim == 0 or any(leaf.ndim != first.ndim for leaf in leaves):
            raise ValueError(
                "shard() takes a PyDataset or generator of batches, whose arrays begin with the "
                f"axis of samples; got the shapes {[leaf.shape for leaf in leaves]}."
            )
        axes = zip(*(leaf.shape[1:] for leaf in leaves), strict=True)
        shape = [sizes[0] if len(set(sizes)) == 1 else None for sizes in axes]
        return tf.TensorSpec([None, *shape], first.dtype)

    return tf.nest.map_structure(of_leaf, *batches)
