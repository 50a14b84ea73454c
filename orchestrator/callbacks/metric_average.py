"""`MetricAverage`: the name Horovod's scripts know."""

from __future__ import annotations

from orchestrator.callbacks.global_metrics import GlobalMetrics


class MetricAverage(GlobalMetrics):
    """A `GlobalMetrics`: epochs' logs are those of all ranks together.

    Horovod averages results, which is wrong on uneven parts and for metrics such as AUC; here their
    state is summed, in one allreduce an epoch. Callbacks of this package add one by themselves.

    Args:
        device: Horovod's; nothing here depends on it.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device
