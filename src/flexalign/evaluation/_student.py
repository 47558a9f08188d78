"""Student's t, without a dependency for one function."""

import math
from functools import lru_cache

__all__ = ["t_quantile"]


@lru_cache(maxsize=256)
def t_quantile(confidence: float, freedom: int) -> float:
    """The t for which |T| ≤ t with probability `confidence`.

    Args:
        confidence: In (0, 1).
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _t_coverage(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_coverage(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _t_coverage(t: float, freedom: int) -> float:
    """P(|T| ≤ t), exact for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine2 = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(1 + odd, freedom - 2, 2):
        term *= cosine2 * k / (k + 1)
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
