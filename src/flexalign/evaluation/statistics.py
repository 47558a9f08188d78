"""Intervals for figures that are measured on questions, several samples each.

Samples of one question are alike, so the question, not the sample, is the unit that counts: every
interval here is clustered. All of them return low, estimate and high.
"""

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexalign.errors import ConfigError, DataError

__all__ = [
    "Interval",
    "clustered_interval",
    "equivalent",
    "paired_difference_interval",
    "simultaneous_confidence",
    "simultaneous_interval",
]


class Interval(NamedTuple):
    """A confidence interval with its estimate."""

    low: float
    mean: float
    high: float


def clustered_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
    *,
    share: bool | None = None,
) -> Interval:
    """Interval of a share or a mean, samples clustered by question.

    A share gets Wilson's score interval at the effective sample size ``n* = n / deff · (z/t)²``,
    where the design effect ``deff ≥ 1`` is the clustered variance over the binomial one and t has
    (clusters − 1) degrees of freedom (Korn and Graubard 1998, "Confidence intervals for
    proportions with small expected number of positive counts estimated from survey data"; with
    Wilson's in place of the exact limits as Dean and Pagano 2015 recommend). If all samples
    agree, the design effect cannot be estimated and only the questions count. It never leaves
    [0, 1] and does not shrink to a point at 0 or 1.

    A mean gets ``mean ± t·se`` with the cluster-robust standard error.

    Args:
        values: One value per sample, shape (n,).
        clusters: The question of each sample, n of them.
        confidence: Coverage, in (0, 1).
        share: Whether the values are yes and no (1 and 0). If not given: whether they are all
            0, 1, False or True.

    Returns:
        Low, mean over samples, high. With a single question nothing is known about others: a
        share gets [0, 1], a mean [−inf, inf].

    Raises:
        DataError: If there are no values, or not as many as clusters, or a share is not 0 or 1.
        ConfigError: If `confidence` is not between 0 and 1.
    """
    _check_confidence(confidence)
    data, index, groups = _clustered(values, clusters)
    binary = bool(np.isin(data, (0.0, 1.0)).all())
    if share and not binary:
        raise DataError("a share needs values that are 0 or 1; pass share=False for a mean.")
    mean = float(data.mean())
    variance = _cluster_variance(_sums(data - mean, index, groups) / data.size)
    if share or (share is None and binary):
        return _wilson(mean, _effective_size(mean, variance, data.size, groups), groups, confidence)
    if groups == 1:
        return Interval(-math.inf, mean, math.inf)
    half = _t_quantile(confidence, groups - 1) * math.sqrt(variance)
    return Interval(mean - half, mean, mean + half)


def paired_difference_interval(
    first: ArrayLike,
    first_clusters: Sequence[Hashable],
    second: ArrayLike,
    second_clusters: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval:
    """Interval of mean(first) − mean(second), two systems on the same questions.

    The difference is taken question by question, so that what makes a question hard for both
    cancels; the numbers of samples may differ. For shares one half is added to each cell of the
    two-by-two table of questions, as Agresti and Min (2005) do for matched pairs, so that the
    interval keeps its width where the two never disagree.

    Args:
        first: Values of the first system, shape (n,).
        first_clusters: The question of each.
        second: Values of the second system, shape (m,).
        second_clusters: The question of each.
        confidence: Coverage, in (0, 1).

    Returns:
        Low, difference of the means, high. With a single question, [−1, 1] for shares and
        [−inf, inf] for means.

    Raises:
        DataError: If the two were not measured on the same questions, or as for
            `clustered_interval`.
    """
    _check_confidence(confidence)
    a, a_index, groups = _clustered(first, first_clusters)
    b, b_index, _ = _clustered(second, second_clusters)
    only = set(first_clusters) ^ set(second_clusters)
    if only:
        raise DataError(
            f"{len(only)} questions were answered by one of the two only (such as "
            f"{next(iter(only))!r}); compare on the questions that both have."
        )
    shares = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    difference = float(a.mean() - b.mean())
    if groups == 1:
        limit = 1.0 if shares else math.inf
        return Interval(-limit, difference, limit)
    t = _t_quantile(confidence, groups - 1)
    parts = _sums(a - a.mean(), a_index, groups) / a.size
    parts -= _sums(b - b.mean(), b_index, groups) / b.size
    variance = _cluster_variance(parts)
    if not shares:
        half = t * math.sqrt(variance)
        return Interval(difference - half, difference, difference + half)
    shrink = groups / (groups + 2)
    centre = difference * shrink
    spread = variance * groups + 1 / groups + difference**2 * (1 - shrink)
    half = t * math.sqrt(spread * groups) / (groups + 2)
    return Interval(
        max(-1.0, min(centre - half, difference)),
        difference,
        min(1.0, max(centre + half, difference)),
    )


def simultaneous_confidence(comparisons: int, confidence: float = 0.95) -> float:
    """Coverage that each of several intervals needs for all to hold together (Bonferroni).

    Raises:
        ConfigError: If there is no comparison, or `confidence` is not between 0 and 1.
    """
    _check_confidence(confidence)
    if comparisons < 1:
        raise ConfigError(f"comparisons must be at least 1, got {comparisons}.")
    return 1 - (1 - confidence) / comparisons


def simultaneous_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    comparisons: int,
    confidence: float = 0.95,
    *,
    share: bool | None = None,
) -> Interval:
    """One of `comparisons` intervals that hold all together with the given confidence.

    Args:
        values: As in `clustered_interval`.
        clusters: As in `clustered_interval`.
        comparisons: How many intervals are to hold at once.
        confidence: That all of them do.
        share: As in `clustered_interval`.
    """
    level = simultaneous_confidence(comparisons, confidence)
    return clustered_interval(values, clusters, level, share=share)


def equivalent(interval: tuple[float, float, float], target: float, margin: float) -> bool:
    """Whether a whole interval lies within ``target ± margin``.

    A wide interval is never equivalent: too few questions prove nothing.
    """
    low, _, high = interval
    return target - margin <= low and high <= target + margin


def _clustered(
    values: ArrayLike, clusters: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.intp], int]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size != len(clusters):
        raise DataError(
            f"values of shape {data.shape} need one cluster each, got {len(clusters)} clusters."
        )
    if data.size == 0:
        raise DataError("there are no values to take an interval of.")
    if not np.isfinite(data).all():
        raise DataError("some values are NaN or infinite; leave them out and count them apart.")
    numbers: dict[Hashable, int] = {}
    for cluster in sorted(set(clusters), key=repr):
        numbers[cluster] = len(numbers)
    index = np.fromiter((numbers[cluster] for cluster in clusters), np.intp, data.size)
    return data, index, len(numbers)


def _sums(values: NDArray[np.float64], index: NDArray[np.intp], groups: int) -> NDArray[np.float64]:
    return np.bincount(index, values, groups)


def _cluster_variance(parts: NDArray[np.float64]) -> float:
    """Variance of a sum of independent, centred cluster parts (linearisation, G/(G−1))."""
    groups = parts.size
    return float((parts**2).sum()) * groups / (groups - 1) if groups > 1 else math.inf


def _effective_size(share: float, variance: float, samples: int, groups: int) -> float:
    if share in (0.0, 1.0):
        return float(groups)
    return min(float(samples), share * (1 - share) / variance)


def _wilson(share: float, size: float, groups: int, confidence: float) -> Interval:
    if groups == 1:
        return Interval(0.0, share, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    size *= (z / _t_quantile(confidence, groups - 1)) ** 2
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    return Interval(max(0.0, min(centre - half, share)), share, min(1.0, max(centre + half, share)))


@lru_cache(maxsize=256)
def _t_quantile(confidence: float, freedom: int) -> float:
    """The t for which |T| ≤ t with probability `confidence`, by bisection."""
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


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence}.")
