"""Where a rank is in some data, so that a resumed run goes on there."""

from __future__ import annotations


class Position:
    """Which pass over some data comes next, and at which of its batches it begins.

    Attributes:
        passes: Passes begun so far. Each begins when its first batch is asked for.
        skip: Batches that passes still to come leave out, without reading them.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.skip = 0

    def begin(self, length: int | None) -> tuple[int, int]:
        """Begins a pass; called where the data are read.

        Args:
            length: Batches in a pass; `None` without end.

        Returns:
            The number of the pass, from 0, and of its first batch that is to be read. Those
            before are given as batches without samples, so that a pass keeps its length.
        """
        first = self.skip if length is None else min(self.skip, length)
        self.skip -= first
        self.passes += 1
        return self.passes - 1, first
