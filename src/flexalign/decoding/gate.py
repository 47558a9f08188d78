"""The gate that is proposed for a pair: between what the two differ in and mere noise.

Total variations (TVs) of many positions are split, on a logarithmic scale and each position
weighted by its TV, into the two groups that explain most of their variance (Otsu's threshold). The
noise floor n is the weighted 99 % quantile of the lower group, s the weighted 1 % quantile of the
upper one, the gate √(s·n): half-way between. s/n is the *separation*; near 1 the two groups pass
into each other, and a gate cuts where there is no gap.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_DIFFERENCE", "propose_gate"]

NO_DIFFERENCE = 1e-4
"""A total variation so small that no λ in use makes it matter; smaller ones count as this."""

_TAIL = 0.01


def propose_gate(variations: NDArray[np.float64]) -> tuple[float | None, float, float]:
    """Propose a gate from total variations; the rule is at the top of this module.

    Args:
        variations: One for each position.

    Returns:
        The gate (None if the models differ nowhere by more than 0.0001), the noise floor and the
        separation.
    """
    weights = np.sort(variations).clip(NO_DIFFERENCE)
    if not len(weights) or weights[-1] == NO_DIFFERENCE:
        return None, 0.0, 1.0
    logs = np.log(weights)
    below, total = np.cumsum(weights)[:-1], weights.sum()
    moments = np.cumsum(weights * logs)[:-1]
    mean = (weights * logs).sum() / total
    # Otsu: the split with the largest variance between its two groups.
    between = (moments - mean * below) ** 2 / (below * (total - below))
    split = int(between.argmax()) + 1 if len(between) else 0
    signal = _weighted_quantile(weights[split:], _TAIL)
    noise = _weighted_quantile(weights[:split], 1 - _TAIL) if split else signal
    return float(np.sqrt(signal * noise)), noise, signal / noise


def _weighted_quantile(ordered: NDArray[np.float64], share: float) -> float:
    """Return the value below which this share of the sum of all values lies."""
    sums = np.cumsum(ordered)
    return float(ordered[int(np.searchsorted(sums, share * sums[-1]))])
