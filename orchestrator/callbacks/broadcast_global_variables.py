"""`BroadcastGlobalVariables`: the name Horovod's scripts know."""

from __future__ import annotations

from typing import Any

from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.config import SettingError


class BroadcastGlobalVariables(RankAware):
    """Gives all ranks rank 0's weights and optimizer state as training begins.

    The same as `runtime.broadcast(model)`, which needs no callback; called by all ranks, one
    message for each 64 MiB.

    Args:
        root_rank: 0, the rank that all else comes from as well.
        device: Horovod's; nothing here depends on it.

    Raises:
        SettingError: Another `root_rank`.
    """

    def __init__(self, root_rank: int = 0, device: str = "") -> None:
        super().__init__()
        if root_rank != 0:
            raise SettingError(
                f"BroadcastGlobalVariables(root_rank={root_rank}) is not allowed: checkpoints are "
                "loaded and written on rank 0, so root_rank is 0."
            )
        self.root_rank, self.device = root_rank, device

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcasts."""
        self._runtime.broadcast(self.model)
