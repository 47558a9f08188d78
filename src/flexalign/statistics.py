"""Intervals for figures that are measured on questions with several samples each.

Samples of one question are correlated, so the independent unit is the question and not the sample:
all intervals are clustered by question. All of them return low, estimate and high.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

from flexalign.errors import ConfigError, DataError

_SMALLEST_TAIL = 2.0**-54


class Interval(NamedTuple):
    """A confidence interval with its estimate.

    In a file it has two keys, ``NAME`` and ``NAME_ci``; JSON has no infinity, so an unknown end is null
    there.

    Attributes:
        low: The lower end.
        mean: The estimate.
        high: The upper end.
    """

    low: float
    mean: float
    high: float

    @classmethod
    def from_json(cls, given: Mapping[str, Any], name: str) -> "Interval":
        """Read an interval from its two keys; a null end becomes infinite.

        Raises:
            KeyError: If a key is missing.
        """
        low, high = given[f"{name}_ci"] or (None, None)
        return cls(
            -math.inf if low is None else low, given[name], math.inf if high is None else high
        )

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the two keys of an interval; an infinite end becomes null."""
        ends = [float(end) if math.isfinite(end) else None for end in (self.low, self.high)]
        return {name: self.mean, f"{name}_ci": ends}


def clustered_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
    *,
    share: bool | None = None,
) -> Interval:
    """Compute the interval of a share or a mean, with samples clustered by question.

    A share gets Wilson's score interval at the effective sample size ``n* = n / deff · (z/t)²``,
    where the design effect ``deff ≥ 1`` is the variance between questions over the binomial one
    and t has (questions − 1) degrees of freedom (Korn and Graubard 1998, "Confidence intervals
    for proportions with small expected number of positive counts estimated from survey data";
    Wilson's in place of their exact limits as in Dean and Pagano 2015, "Evaluating confidence
    interval methods for binomial proportions in clustered surveys"). Only for the estimate of
    deff, half a question that is all right and half a question that is all wrong are added:
    without them few failures give too small a deff, and coverage near 0 and 1 falls to 0.89. The
    interval is always within [0, 1] and does not shrink to a point at 0 or 1.

    A mean gets ``mean ± t·se`` with the cluster-robust standard error.

    Args:
        values: One value for each sample, shape (n,).
        clusters: The question of each sample, n of them.
        confidence: Coverage, in (0, 1).
        share: Whether the figure is a share, of values 0 and 1. If not given, it is one if all
            values are 0, 1, False or True.

    Returns:
        Low, mean over samples, high. A single question says nothing about others: the interval is
        [0, 1] for a share and [−inf, inf] for a mean.

    Raises:
        DataError: If there are no values, not as many values as clusters, or a value of a share
            is not 0 or 1.
        ConfigError: If `confidence` is not between 0 and 1.
    """
    _check_confidence(confidence)
    data, index, groups = _clustered(values, clusters)
    binary = bool(np.isin(data, (0.0, 1.0)).all())
    if share and not binary:
        raise DataError("a share needs values that are 0 or 1; pass share=False for a mean.")

    mean = float(data.mean())
    if share or (share is None and binary):
        if groups == 1:
            return Interval(0.0, mean, 1.0)
        size = _effective_size(data, index, groups)
        low, high = _wilson_limits(mean, size, t_quantile(confidence, groups - 1), confidence)
        return Interval(low, mean, high)
    return _student(mean, _sums(data - mean, index, groups) / data.size, confidence)


def paired_difference_interval(
    first: ArrayLike,
    first_clusters: Sequence[Hashable],
    second: ArrayLike,
    second_clusters: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval:
    """Compute the interval of mean(first) − mean(second), of two systems on the same questions.

    The difference is taken for each question, so that the common difficulty of a question cancels;
    the numbers of samples may differ. Shares get Tango's score interval for paired proportions
    ("Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", 1998) at the effective number of questions, so that the interval keeps a
    width if the two never disagree.

    Args:
        first: Values of the first system, shape (n,).
        first_clusters: The question of each.
        second: Values of the second system, shape (m,).
        second_clusters: The question of each.
        confidence: Coverage, in (0, 1).

    Returns:
        Low, difference of the means, high. With a single question, the interval is [−1, 1] for
        shares and [−inf, inf] for means.

    Raises:
        DataError: If the two were not measured on the same questions, or as in
            `clustered_interval`.
    """
    _check_confidence(confidence)
    _check_same_questions(first_clusters, second_clusters)
    a, a_index, groups = _clustered(first, first_clusters)
    b, b_index, _ = _clustered(second, second_clusters)

    difference = float(a.mean() - b.mean())
    per_question = groups * (
        _sums(a, a_index, groups) / a.size - _sums(b, b_index, groups) / b.size
    )
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        return _student(difference, (per_question - difference) / groups, confidence)
    if groups == 1:
        return Interval(-1.0, difference, 1.0)

    disagreement = min(1.0, float(np.abs(per_question).mean()))
    variance = float(((per_question - difference) ** 2).mean())
    size = float(groups)
    if variance > 0:
        effective = groups * (disagreement - difference**2) / variance
        size = min(effective, float(min(a.size, b.size)))
    low, high = _tango_limits(difference, disagreement, size, t_quantile(confidence, groups - 1))
    return Interval(low, difference, high)


def paired_ratio_interval(
    first: ArrayLike,
    first_clusters: Sequence[Hashable],
    second: ArrayLike,
    second_clusters: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval:
    """Compute the interval of mean(first) ÷ mean(second), of two systems on the same questions.

    The figure is the ratio R of means, not the mean of ratios. The interval is Student's, with the
    variance of (first − R · second) ÷ mean(second) over questions (Cochran 1977, "Sampling
    techniques", 6.3).

    Args:
        first: Values of the first system, shape (n,).
        first_clusters: The question of each.
        second: Values of the second system, shape (m,), with a positive mean.
        second_clusters: The question of each.
        confidence: Coverage, in (0, 1).

    Returns:
        Low, ratio, high. With a single question, the interval is [−inf, inf].

    Raises:
        DataError: If the mean of `second` is not positive, the two were not measured on the same
            questions, or as in `clustered_interval`.
    """
    _check_confidence(confidence)
    _check_same_questions(first_clusters, second_clusters)
    a, a_index, groups = _clustered(first, first_clusters)
    b, b_index, _ = _clustered(second, second_clusters)
    if not b.mean() > 0:
        raise DataError(f"a ratio needs a second mean above zero, got {b.mean()}.")

    ratio = float(a.mean() / b.mean())
    own = _sums(a, a_index, groups) / a.size
    parts = (own - ratio * _sums(b, b_index, groups) / b.size) / b.mean()
    return _student(ratio, parts, confidence)


def token_cut_interval(
    tokens: ArrayLike,
    questions: Sequence[Hashable],
    reference_tokens: ArrayLike,
    reference_questions: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval:
    """Compute the interval of a token cut, paired and clustered by question.

    The cut is 1 − mean(tokens) ÷ mean(reference tokens).

    Args:
        tokens: Tokens of each sample, shape (n,).
        questions: The question of each.
        reference_tokens: Tokens of each of the reference's samples, shape (m,).
        reference_questions: The question of each.
        confidence: Coverage, in (0, 1).

    Returns:
        Low, cut, high; 0.6 means that 60 % were saved, a negative cut that more were spent.

    Raises:
        DataError: As in `paired_ratio_interval`.
    """
    ratio = paired_ratio_interval(
        tokens, questions, reference_tokens, reference_questions, confidence
    )
    return Interval(1 - ratio.high, 1 - ratio.mean, 1 - ratio.low)


def simultaneous_confidence(comparisons: int, confidence: float = 0.95) -> float:
    """Return the coverage of each of several intervals for simultaneous coverage (Bonferroni).

    Args:
        comparisons: Number of intervals.
        confidence: Probability that all intervals cover, in (0, 1).

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
    """Compute one of `comparisons` intervals with the given simultaneous confidence.

    Args:
        values: As in `clustered_interval`.
        clusters: As in `clustered_interval`.
        comparisons: Number of intervals.
        confidence: Probability that all intervals cover, in (0, 1).
        share: As in `clustered_interval`.
    """
    level = simultaneous_confidence(comparisons, confidence)
    return clustered_interval(values, clusters, level, share=share)


def equivalent(interval: tuple[float, float, float], target: float, margin: float) -> bool:
    """Whether a whole interval is within ``target ± margin``.

    An interval wider than 2 · margin is never equivalent, so too few questions prove nothing.
    """
    low, _, high = interval
    return target - margin <= low and high <= target + margin


def t_quantile(confidence: float, freedom: int) -> float:
    """Return the t for which |T| ≤ t with probability `confidence`, for Student's T.

    Args:
        confidence: In (0, 1). A value that rounds to 1 is taken as the largest number below 1, so
            that the quantile is always finite.
        freedom: Degrees of freedom, at least 1.
    """
    return -float(stdtrit(freedom, max((1 - confidence) / 2, _SMALLEST_TAIL)))


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


def _check_same_questions(first: Sequence[Hashable], second: Sequence[Hashable]) -> None:
    only = set(first) ^ set(second)
    if only:
        raise DataError(
            f"{len(only)} questions were answered by one of the two only (such as "
            f"{next(iter(only))!r}); compare on the questions that both have."
        )


def _sums(values: NDArray[np.float64], index: NDArray[np.intp], groups: int) -> NDArray[np.float64]:
    return np.bincount(index, values, groups).astype(np.float64)


def _wilson_limits(share: float, size: float, t: float, confidence: float) -> tuple[float, float]:
    """Return Wilson's limits of a share: the true values that a score test does not reject.

    Args:
        share: The measured share.
        size: Number of independent samples.
        t: Student's quantile; the size is multiplied by (z/t)², as the design effect is estimated.
        confidence: Coverage, in (0, 1).
    """
    z = float(ndtri((1 + confidence) / 2))
    size *= (z / t) ** 2
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def _tango_limits(
    difference: float, disagreement: float, size: float, z: float
) -> tuple[float, float]:
    """Return Tango's limits of a difference of paired shares.

    Args:
        difference: Share of questions that only the first got right, minus the share that only
            the second got right.
        disagreement: Sum of these two shares.
        size: Number of questions.
        z: Quantile of the test.
    """
    second_only = (disagreement - difference) / 2

    def score(delta: float) -> float:
        """Return the statistic of a true difference `delta`; it falls from inf at −1 to −inf at 1."""
        gap = difference - delta
        if gap == 0:
            return 0.0
        linear = (2 - difference) * delta - disagreement
        root = math.sqrt(max(linear**2 + 8 * second_only * delta * (1 - delta), 0.0))
        variance = (root - linear) / 2 + delta * (1 - delta)
        if abs(delta) == 1 or variance <= 0:  # the variance at ±1 is 0, but rounding may not give 0
            return math.copysign(math.inf, gap)
        return gap * math.sqrt(size / variance)

    def crossing(low: float, high: float, level: float) -> float:
        if low == high:
            return low
        return float(brentq(lambda delta: score(delta) - level, low, high, xtol=1e-12))

    return crossing(-1.0, difference, z), crossing(difference, 1.0, -z)


def _student(estimate: float, parts: NDArray[np.float64], confidence: float) -> Interval:
    """Return Student's interval of a sum of independent parts.

    Args:
        estimate: The sum.
        parts: The parts minus their means, one for each question, shape (questions,).
        confidence: Coverage, in (0, 1).
    """
    groups = parts.size
    if groups == 1:
        return Interval(-math.inf, estimate, math.inf)
    error = math.sqrt(float((parts**2).sum()) * groups / (groups - 1))
    half = t_quantile(confidence, groups - 1) * error
    return Interval(estimate - half, estimate, estimate + half)


def _effective_size(data: NDArray[np.float64], index: NDArray[np.intp], groups: int) -> float:
    """Return the number of independent samples that estimate a share as precisely as these."""
    question = data.size / groups
    total = data.size + question
    share = (float(data.sum()) + question / 2) / total
    squares = float((_sums(data - share, index, groups) ** 2).sum())
    # The added half questions, one all right and one all wrong.
    squares += question**2 * ((1 - share) ** 2 + share**2) / 2
    binomial = share * (1 - share) * total**2
    return min(float(data.size), binomial / squares * groups / (groups + 1))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence}.")
