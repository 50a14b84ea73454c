"""One step's gradients summed over all ranks, each rank counting by what is behind its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from orchestrator.communicators.base import Communicator, Wire
from orchestrator.flags import Flags
from orchestrator.times import Times


class Behind(NamedTuple):
    """What stands behind a rank's gradients in one step.

    Attributes:
        count: Scalar; the number its loss was divided by: samples, unless something else was
            counted. 0 where the rank has none.
        summed: The loss was not divided by anything, so that gradients add up.
    """

    count: Any
    summed: bool = False


_traced = threading.local()


@contextlib.contextmanager
def samples(count: tf.Tensor | int) -> Iterator[None]:
    """Says how many samples stand behind the gradients applied inside; does not communicate.

    `Runtime.broadcast` puts it around a model's `train_step`; a training loop of your own puts it
    around `optimizer.apply_gradients`.

    Args:
        count: Scalar, this rank's samples in this step; 0 where it has none.
    """
    previous = sample_count(), getattr(_traced, "behind", None)
    _traced.samples, _traced.behind = count, Behind(count)
    try:
        yield
    finally:
        _traced.samples, _traced.behind = previous


def sample_count() -> Any:
    """What the surrounding `samples` block was given; `None` outside of one."""
    return getattr(_traced, "samples", None)


def correct(said: Behind) -> None:
    """Says, inside a `samples` block, what the loss was divided by instead."""
    _traced.behind = said


def behind() -> Behind:
    """What stands behind the gradients of the surrounding `samples` block.

    Raises:
        RuntimeError: There is none.
    """
    said = getattr(_traced, "behind", None)
    if said is None:
        raise RuntimeError(
            "This optimizer is distributed, but nothing says how many samples are behind its "
            "gradients. Call `runtime.broadcast(model)` before `model.fit`; in a training loop "
            "of your own put `with runtime.samples(count):` around `optimizer.apply_gradients`."
        )
    return said


class Reduction(NamedTuple):
    """How gradients travel.

    Attributes:
        communicator: The ranks.
        name: Tells one optimizer's collectives from another's.
        buckets: Grouped collectives a step.
        wire: The type dense gradients travel in, or `None` for their own.
        flags: What travels beside the count of each step; nothing by default.
        times: Where the seconds of the reduction are noted; nowhere by default.
    """

    communicator: Communicator
    name: str
    buckets: int = 1
    wire: Wire | None = None
    flags: Flags | None = None
    times: Times | None = None

    def mean(self, grads: Sequence[Any]) -> list[Any]:
        """The global batch's gradients, in one grouped collective a bucket.

        Where all gradients are dense and travel in their own type, counts travel with them:

            sum over ranks of (count * gradient) / sum over ranks of (count)

        Otherwise the counts are summed first (one small message).
        """
        said = behind()
        if said.summed or self.wire or any(isinstance(g, tf.IndexedSlices) for g in grads):
            return self.sum(self.shares(grads))
        count = tf.cast(said.count, tf.float32)
        own = [_widened(g) for g in grads]
        # A rank without samples sends zeros, also where its mean over nothing was NaN.
        weighted = [tf.math.multiply_no_nan(g, tf.cast(count, g.dtype)) for g in own]
        first, *rest = cut(weighted, self.buckets)
        buckets = [[*first, self._facts(count)], *([*bucket, count[tf.newaxis]] for bucket in rest)]
        groups = self.communicator.sum_gradients(buckets, self.name)
        self._show(groups[0][-1])
        result: list[tf.Tensor] = []
        for *sums, facts in groups:
            result += [tf.math.divide_no_nan(s, tf.cast(facts[0], s.dtype)) for s in sums]
        return [tf.cast(s, g.dtype) for s, g in zip(result, grads, strict=True)]

    def shares(self, grads: Sequence[Any]) -> list[Any]:
        """What each rank adds to the global batch's gradients; sums the counts (one message)."""
        said = behind()
        count = tf.cast(said.count, tf.float32)
        ((facts,),) = self.communicator.sum_gradients([[self._facts(count)]], f"{self.name}.count")
        self._show(facts)
        if said.summed:
            share = tf.cast(count > 0, tf.float32)
        else:
            share = tf.math.divide_no_nan(count, facts[0])
        return [_times(g, share) for g in grads]

    def _facts(self, count: tf.Tensor) -> tf.Tensor:
        """The count and the flags, as one small tensor."""
        count = count[tf.newaxis]
        return count if self.flags is None else tf.concat([count, self.flags.own()], 0)

    def _show(self, facts: tf.Tensor) -> None:
        if self.flags is not None:
            self.flags.show(facts[1:])

    def sum(self, grads: Sequence[Any]) -> list[Any]:
        """The plain sum over ranks: one grouped collective a bucket, and two a sparse gradient."""
        dense = [g for g in grads if not isinstance(g, tf.IndexedSlices)]
        buckets = cut([_widened(g) for g in dense], self.buckets)
        groups = self.communicator.sum_gradients(buckets, self.name, self.wire) if dense else []
        sums = iter([s for group in groups for s in group])
        return [
            self._sparse_sum(g, index)
            if isinstance(g, tf.IndexedSlices)
            else tf.cast(next(sums), g.dtype)
            for index, g in enumerate(grads)
        ]

    def _sparse_sum(self, grad: tf.IndexedSlices, index: int) -> tf.IndexedSlices:
        """Rows laid end to end in rank order, which is the order of the global batch.

        They are not added up by index: Keras's optimizers see the rows one process would see,
        and Adam's squares depend on that. Where all ranks looked up the same rows (positions, not
        tokens), so does one process for all of them, and each row is a sum.
        """
        name = f"{self.name}.sparse.{index}"
        indices, values = grad.indices, grad.values
        # With its length in front a rank's block cannot be taken for parts of others.
        block = tf.concat([[tf.size(indices, indices.dtype)], indices], 0)
        blocks = self.communicator.concat_rows(block, f"{name}.indices")
        size, length = self.communicator.size, tf.size(block)
        alike = tf.size(blocks) == size * length
        alike = tf.cond(
            alike, lambda: tf.reduce_all(tf.reshape(blocks, [size, length]) == block), lambda: False
        )

        def summed() -> tuple[Any, Any]:
            ((total,),) = self.communicator.sum_gradients([[_widened(values)]], f"{name}.sum")
            return indices, tf.cast(total, values.dtype)

        def laid() -> tuple[Any, Any]:
            own = self.communicator.concat_rows(indices, f"{name}.rows")
            return own, self.communicator.concat_rows(values, f"{name}.values")

        indices, values = tf.cond(alike, summed, laid)
        return tf.IndexedSlices(values, indices, grad.dense_shape)


def _widened(grad: Any) -> tf.Tensor:
    """Half precision as float32: counts times gradients would leave its range."""
    grad = tf.convert_to_tensor(grad)
    return tf.cast(grad, tf.float32) if grad.dtype.size == 2 else grad


def _times(grad: Any, share: tf.Tensor) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        values = _times(grad.values, share)
        return tf.IndexedSlices(values, grad.indices, grad.dense_shape)
    wide = _widened(grad)
    return tf.cast(tf.math.multiply_no_nan(wide, tf.cast(share, wide.dtype)), grad.dtype)


def cut(tensors: Sequence[tf.Tensor], buckets: int) -> list[list[tf.Tensor]]:
    """Cuts tensors, in order, into at most `buckets` runs of about equal bytes, none empty."""
    sizes = [(t.shape.num_elements() or 1) * t.dtype.size for t in tensors]
    total, done = sum(sizes), 0
    result: list[list[tf.Tensor]] = [[] for _ in range(buckets)]
    for tensor, size in zip(tensors, sizes, strict=True):
        middle = done + size / 2
        result[min(int(middle * buckets / total), buckets - 1)].append(tensor)
        done += size
    return [bucket for bucket in result if bucket]
