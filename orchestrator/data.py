"""This rank's part of every global batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from orchestrator.communicators.base import Communicator


def part(length: Any, rank: int, size: int) -> tuple[Any, Any]:
    """Where a rank's part of `length` samples begins, and how many it has.

    The parts are contiguous, in rank order, cover everything once and differ by at most one
    sample. Takes Python numbers or scalar tensors.
    """
    share, rest = length // size, length % size
    if isinstance(length, int):
        return rank * share + min(rank, rest), share + (rank < rest)
    return rank * share + tf.minimum(rank, rest), share + tf.cast(rank < rest, share.dtype)


def shard(
    data: Any,
    communicator: Communicator,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> tf.data.Dataset:
    """Gives this rank its part of every global batch; called by all ranks.

    Every rank gets as many batches as there are global ones, so all make the same number of
    steps; a part may be empty, and every sample is in exactly one. The ranks compare lengths and
    element types once, here (one small collective).

    Args:
        data: A `tf.data.Dataset` batched to the **global** batch size, with the same elements in
            the same order on all ranks (seeded shuffles, which `init` sees to); or arrays: NumPy
            arrays or tensors of one length in any nesting, `(x, y)` for instance.
        communicator: The ranks.
        batch_size: The global batch size; for arrays only, and needed there.
        shuffle: For arrays only: a new global order each epoch, the same on all ranks.
        seed: The order's seed.

    Returns:
        A dataset of this rank's parts. Arrays are sliced by index, each rank copying only its
        own samples; a dataset is read whole on every rank and cut.

    Raises:
        ValueError: On every rank: elements are not batched, arrays differ in length, an argument
            is missing or out of place, or the ranks' data are not alike.
    """
    rank, size = communicator.rank, communicator.size
    try:
        signature, problem = _signature(data, batch_size, shuffle), None
    except ValueError as error:
        signature, problem = "", str(error)
    _compare(communicator.allgather_object((signature, problem)))
    if isinstance(data, tf.data.Dataset):
        return _dataset_parts(data, rank, size)
    order = _order(len(tf.nest.flatten(data)[0]), shuffle, seed)
    return _array_parts(data, order.batch(batch_size or 1), rank, size)


def _signature(data: Any, batch_size: int | None, shuffle: bool) -> str:
    """Checks one rank's data and says in words what must be alike on all ranks."""
    if isinstance(data, tf.data.Dataset):
        if batch_size is not None or shuffle:
            raise ValueError(
                "shard() takes batch_size and shuffle for arrays only; a tf.data.Dataset is "
                "shuffled and batched to the global batch size before it is passed in."
            )
        shapes = [leaf.shape for leaf in tf.nest.flatten(data.element_spec)]
        lengths = {shape[0] for shape in shapes if shape.rank} - {None}
        if len(lengths) > 1 or any(shape.rank == 0 for shape in shapes):
            raise ValueError(
                "shard() takes a dataset batched to the global batch size, got elements "
                f"{data.element_spec}. Call dataset.batch(global_batch_size) first."
            )
        return f"{int(data.cardinality())} global batches of {data.element_spec}"
    leaves = [np.asarray(leaf) for leaf in tf.nest.flatten(data)]
    if len({leaf.shape[:1] for leaf in leaves}) != 1 or leaves[0].ndim == 0:
        raise ValueError(
            "shard() takes a tf.data.Dataset, or arrays that all have as many samples; got "
            f"shapes {[leaf.shape for leaf in leaves]}."
        )
    if batch_size is None or batch_size < 1:
        raise ValueError(
            "shard() of arrays needs the global batch size: shard(arrays, batch_size=64). "
            f"Got batch_size={batch_size}."
        )
    kinds = [f"{leaf.dtype}{leaf.shape[1:]}" for leaf in leaves]
    return f"{len(leaves[0])} samples of {', '.join(kinds)} in batches of {batch_size}"


def _compare(everyone: list[tuple[str, str | None]]) -> None:
    for rank, (signature, problem) in enumerate(everyone):
        if problem is not None:
            raise ValueError(problem)
        if signature != everyone[0][0]:
            raise ValueError(
                "The ranks' data are not alike: every rank must pass the same global data to "
                f"shard(). Rank 0 has {everyone[0][0]}; rank {rank} has {signature}."
            )


def _dataset_parts(dataset: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    def own(*batch: Any) -> Any:
        # A dataset of dicts or single tensors hands each over as one argument.
        element: Any = batch if isinstance(dataset.element_spec, tuple) else batch[0]
        first = tf.nest.flatten(element)[0]
        length = first.shape[0]
        begin, count = part(tf.shape(first)[0] if length is None else length, rank, size)
        return tf.nest.map_structure(lambda leaf: leaf[begin : begin + count], element)

    return dataset if size == 1 else dataset.map(own, num_parallel_calls=tf.data.AUTOTUNE)


def _order(length: int, shuffle: bool, seed: int) -> tf.data.Dataset:
    order = tf.data.Dataset.range(length)
    if shuffle:
        order = order.shuffle(max(length, 1), seed=seed, reshuffle_each_iteration=True)
    return order


def _array_parts(data: Any, order: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    tensors = tf.nest.map_structure(tf.convert_to_tensor, data)

    def own(indices: tf.Tensor) -> Any:
        begin, count = part(tf.shape(indices)[0], rank, size)
        mine = indices[begin : begin + count]
        return tf.nest.map_structure(lambda tensor: tf.gather(tensor, mine), tensors)

    return order.map(own).prefetch(tf.data.AUTOTUNE)
