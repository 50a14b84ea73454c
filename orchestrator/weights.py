"""Model and optimizer state across ranks: broadcast in few large messages, compared by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.communicators.base import Communicator
from orchestrator.optimizer import own_state

MESSAGE_BYTES = 64 * 2**20


def broadcast_arrays(communicator: Communicator, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns rank 0's arrays on every rank; called by all ranks.

    Args:
        communicator: The ranks.
        arrays: Any dtypes; shapes and dtypes as on rank 0, values used from rank 0 only.

    Returns:
        New arrays. Sent as one message for each 64 MiB of them, whatever their number.
    """
    arrays = [np.asarray(array) for array in arrays]
    result: list[np.ndarray] = []
    for group in _messages(arrays):
        flat = np.concatenate([np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in group])
        flat = communicator.broadcast(flat)
        offset = 0
        for array in group:
            part = flat[offset : offset + array.nbytes]
            result.append(part.view(array.dtype).reshape(array.shape))
            offset += array.nbytes
    return result


def _messages(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    size = 0
    for array in arrays:
        if group and size + array.nbytes > MESSAGE_BYTES:
            yield group
            group, size = [], 0
        group.append(array)
        size += array.nbytes
    if group:
        yield group


def broadcast_model(communicator: Communicator, model: keras.Model) -> None:
    """Gives every rank rank 0's weights and optimizer state; called by all ranks.

    The states of the model's seed generators (dropout, augmentation) become rank 0's with the
    rank mixed in: the same from run to run, different on every rank.

    Args:
        communicator: The ranks.
        model: Built; its optimizer is built here where it is not yet.
    """
    variables = state_variables(model)
    for variable, value in zip(
        variables,
        broadcast_arrays(communicator, [v.numpy() for v in variables]),
        strict=True,
    ):
        variable.assign(value)
    seeds = seed_variables(model)
    states = broadcast_arrays(communicator, [v.numpy() for v in seeds])
    for variable, state in zip(seeds, states, strict=True):
        mixed = np.array(state)
        # 0x9E3779B9 is 2^32 over the golden ratio: it spreads neighbouring ranks far apart.
        mixed[0] = (int(state[0]) + communicator.rank * 0x9E3779B9) % 2**31
        variable.assign(mixed if communicator.rank else state)


def optimizers(model: keras.Model) -> list[Any]:
    """The optimizers a model holds: the compiled one, and others among its attributes."""
    held = [getattr(model, "optimizer", None), *vars(model).values()]
    found = {id(o): o for o in held if isinstance(o, keras.optimizers.Optimizer)}
    return list(found.values())


def state_variables(model: keras.Model) -> list[Any]:
    """The variables that must start the same on all ranks: weights, then the optimizers'."""
    held = optimizers(model)
    if len(held) == 1 and not held[0].built and model.trainable_variables:
        held[0].build(model.trainable_variables)
    return [*model.weights, *(v for optimizer in held for v in optimizer.variables)]


def shared_variables(model: keras.Model) -> list[Any]:
    """The variables that are the same on all ranks after every step.

    Not among them: moving statistics, and gradients accumulated since the last update.
    """
    held = optimizers(model)
    own = {id(v) for optimizer in held for v in own_state(optimizer)}
    variables = [v for optimizer in held for v in optimizer.variables if id(v) not in own]
    return [*model.trainable_variables, *variables]


def seed_variables(model: keras.Model) -> list[Any]:
    """The states of the model's `keras.random.SeedGenerator`s."""
    weights = {id(v) for v in (*model.weights, *model.metrics_variables)}
    return [v for v in model.variables if id(v) not in weights]


def fingerprints(variables: Sequence[Any]) -> np.ndarray:
    """One int64 for each variable, worked out where it lies; does not communicate.

    The bits of element i, read as an integer, times 2i + 1, added up modulo 2^64: an odd factor
    loses no bit, so that any single change shows, and so does an exchange of two elements.
    """
    return np.asarray(_fingerprints([tf.convert_to_tensor(v) for v in variables]))


_INTEGERS = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int64}


@tf.function(reduce_retracing=True)
def _fingerprints(tensors: list[tf.Tensor]) -> tf.Tensor:
    sums = []
    for tensor in tensors:
        flat = tf.reshape(tf.cast(tensor, tf.int8) if tensor.dtype == tf.bool else tensor, [-1])
        bits = tf.cast(tf.bitcast(flat, _INTEGERS[flat.dtype.size]), tf.int64)
        sums.append(tf.reduce_sum(bits * tf.range(1, 2 * tf.size(bits, tf.int64), 2)))
    return tf.stack(sums)


def digest(array: np.ndarray) -> str:
    """Sixteen hexadecimal digits that differ where the bytes do (BLAKE2b)."""
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def weights_digest(model: keras.Model) -> str:
    """One digest of all trainable weights, in order."""
    return digest(
        np.concatenate(
            [np.frombuffer(v.numpy().tobytes(), np.uint8) for v in model.trainable_variables]
            or [np.zeros(0, np.uint8)]
        )
    )
