"""What every communicator offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

Op = Literal["sum", "min", "max"]
Wire = Literal["fp16", "bf16"]
WIRES = ("fp16", "bf16")


class Communicator(Protocol):
    """A fixed group of ranks that make the same collective calls in the same order.

    Every method but `abort` and `lost` is a collective: all ranks call it, and none returns before
    its part is done. Arrays are NumPy arrays on the host, with one shape and dtype on all ranks.

    Attributes:
        name: The backend's name, as `init(backend=...)` takes it.
        rank: This process's number, 0 to `size - 1`. Rank 0 is the root.
        size: Number of ranks (the world size).
        local_rank: This process's number among those on its host.
        local_size: Number of ranks on this host.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int

    def allreduce(self, array: np.ndarray, op: Op = "sum") -> np.ndarray:
        """Combines `array` element by element over all ranks.

        Args:
            array: Any shape; a numeric dtype, the same on all ranks.
            op: `"sum"` (default), `"min"` or `"max"`.

        Returns:
            A new array of the same shape and dtype, the same bytes on every rank.
        """
        ...

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """Returns the root's `array` on every rank; the others' gives the shape and dtype."""
        ...

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Returns the root's picklable object on every rank; the others' is ignored."""
        ...

    def allgather_object(self, obj: Any) -> list[Any]:
        """Returns every rank's picklable object, in rank order, on every rank."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...

    def abort(self, code: int) -> None:
        """Ends this process at once with `code`, and through its launcher the whole job."""
        ...

    def lost(self, error: BaseException) -> bool:
        """Whether an error of a collective says only that another rank is gone."""
        ...

    def sum_gradients(
        self, buckets: Sequence[Sequence[tf.Tensor]], name: str, wire: Wire | None = None
    ) -> list[list[tf.Tensor]]:
        """Sums dense tensors over all ranks; called while a step is traced, or eagerly.

        Args:
            buckets: Groups of float32 or float64 tensors, each reduced by one grouped collective,
                in this order.
            name: Of its own for each place in a step where ranks meet.
            wire: Half precision to send them in; by default they travel as they are.

        Returns:
            The sums in the same arrangement, with the same shapes and dtypes, the same bytes on
            every rank.
        """
        ...

    def concat_rows(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Every rank's tensor laid end to end along the first axis, in rank order.

        Called while a step is traced, or eagerly; the first axis may differ between ranks.
        """
        ...
