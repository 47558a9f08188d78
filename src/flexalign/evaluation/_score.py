"""Limits of shares by score tests: what a test of the true value would not refuse."""

import math
from statistics import NormalDist

__all__ = ["tango_limits", "wilson_limits"]


def wilson_limits(share: float, size: float, t: float, confidence: float) -> tuple[float, float]:
    """Wilson's limits of a share.

    Args:
        share: The share measured.
        size: Number of independent samples.
        t: Student's quantile; the size is cut by (z/t)² for an estimated design effect.
        confidence: Coverage, in (0, 1).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    size *= (z / t) ** 2
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def tango_limits(
    difference: float, disagreement: float, size: float, z: float
) -> tuple[float, float]:
    """Tango's limits of a difference of paired shares.

    Args:
        difference: Share of questions that the first alone got right, less the second's share.
        disagreement: Sum of the two shares.
        size: Number of questions.
        z: Quantile of the test.
    """
    second_only = (disagreement - difference) / 2

    def score(delta: float) -> float:
        linear = (2 - difference) * delta - disagreement
        root = math.sqrt(max(linear**2 + 8 * second_only * delta * (1 - delta), 0.0))
        variance = (root - linear) / 2 + delta * (1 - delta)
        gap = difference - delta
        return gap * math.sqrt(size / variance) if variance > 0 else math.copysign(math.inf, gap)

    def crossing(low: float, high: float, level: float) -> float:
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > level else (low, middle)
        return (low + high) / 2

    return crossing(-1.0, difference, z), crossing(difference, 1.0, -z)
