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
    if isinstance(data, tf.data.Dataset):
        if batch_size is not None or shuffle:
            raise ValueError(
                "shard() takes batch_size and shuffle for arrays only; a tf.data.Dataset is "
                "shuffled and batched to the global batch size before it is passed in."
            )
        signature = f"{int(data.cardinality())} global batches of {data.element_spec}"
    else:
        length = _length(data, batch_size)
        spec = tf.nest.map_structure(lambda a: f"{np.shape(a)[1:]} {np.asarray(a[:1]).dtype}", data)
        signature = f"{length} samples of {spec}"
    signatures = communicator.allgather_object(signature)
    for rank, other in enumerate(signatures):
        if other != signatures[0]:
            raise ValueError(
                "The ranks' data are not alike: every rank must pass the same global data to "
                f"shard(). Rank 0 has {signatures[0]}; rank {rank} has {other}."
            )
    if isinstance(data, tf.data.Dataset):
        return _dataset_parts(data, communicator.rank, communicator.size)
    order = _order(len(tf.nest.flatten(data)[0]), shuffle, seed).batch(batch_size)
    return _array_parts(data, order, communicator.rank, communicator.size)


def _dataset_parts(dataset: tf.data.Dataset, rank: int, size: int) -> tf.data.Dataset:
    leaves = tf.nest.flatten(dataset.element_spec)
    if not leaves or any(leaf.shape.rank == 0 for leaf in leaves):
        raise ValueError(
            f"shard() takes a dataset batched to the global batch size, got elements "
            f"{dataset.element_spec}. Call dataset.batch(global_batch_size) first."
        )

    def own(*batch: Any) -> Any:
        batch = batch if len(batch) > 1 or isinstance(dataset.element_spec, tuple) else batch[0]
        first = tf.nest.flatten(batch)[0]
        length = first.shape[0]
        begin, count = part(tf.shape(first)[0] if length is None else length, rank, size)
        return tf.nest.map_structure(lambda leaf: leaf[begin : begin + count], batch)

    return dataset if size == 1 else dataset.map(own, num_parallel_calls=tf.data.AUTOTUNE)


def _length(data: Any, batch_size: int | None) -> int:
    leaves = tf.nest.flatten(data)
    lengths = {len(leaf) for leaf in leaves if np.ndim(leaf) > 0}
    if len(lengths) != 1 or any(np.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(
            "shard() takes a tf.data.Dataset or arrays that all have as many samples, got "
            f"shapes {[np.shape(leaf) for leaf in leaves]}."
        )
    if batch_size is None or batch_size < 1:
        raise ValueError(
            f"shard() of arrays needs the global batch size: shard(arrays, batch_size=64). "
            f"Got batch_size={batch_size}."
        )
    return lengths.pop()


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
