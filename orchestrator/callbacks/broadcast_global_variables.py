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
        local_variables: Horovod's, for variables of one rank alone; `None` or none here, where
            all ranks hold one model.

    Raises:
        SettingError: Another `root_rank`, or `local_variables`.
    """

    def __init__(
        self, root_rank: int = 0, device: str = "", local_variables: Any | None = None
    ) -> None:
        super().__init__()
        if root_rank != 0:
            raise SettingError(
                f"BroadcastGlobalVariables(root_rank={root_rank}) is not allowed: checkpoints are "
                "loaded and written on rank 0, so root_rank is 0."
            )
        if local_variables is not None and not isinstance(local_variables, list | tuple | set):
            local_variables = [local_variables]
        if local_variables:
            raise SettingError(
                f"BroadcastGlobalVariables(local_variables=...), {len(local_variables)} of them, "
                "is not allowed: all ranks hold one model. Leave it out."
            )
        self.root_rank, self.device = root_rank, device

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Broadcasts."""
        self._runtime.broadcast(self.model)
