"""`scaled_learning_rate`: a learning rate for the global batch."""

from __future__ import annotations

from orchestrator import decisions
from orchestrator import runtime as runtimes
from orchestrator.config import SettingError


def scaled_learning_rate(
    learning_rate: float, rule: decisions.Scaling = "linear", *, factor: float | None = None
) -> float:
    """A rate tuned for one process's batch, scaled for a global batch `factor` times as large.

    Does not communicate; the same on every rank. Scale only where the global batch grows with the
    ranks: with one global batch size for any number of them the rate stays as it is.

    Args:
        learning_rate: For the batch of one process.
        rule: `"linear"` (the default): times `factor` (Goyal et al. 2017, arXiv:1706.02677), with
            `LearningRateWarmup`. `"sqrt"`: times its square root (Krizhevsky 2014,
            arXiv:1404.5997), often used with Adam.
        factor: How many times larger the global batch is; by default the number of ranks (or
            replicas).

    Raises:
        SettingError: An unknown `rule`, or a `factor` that is not above 0.
    """
    factor = runtimes.current().replicas if factor is None else factor
    if rule not in decisions.SCALINGS or factor <= 0:
        raise SettingError(
            f"scaled_learning_rate(rule={rule!r}, factor={factor}) is not allowed: rule is one of "
            f"{', '.join(decisions.SCALINGS)}, factor a number above 0."
        )
    return decisions.scaled(learning_rate, factor, rule)
