"""Distances to a dial's chord and to the hull of all mixtures, with their intervals."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.statistics import Interval, t_quantile

__all__ = ["Distances", "Measured", "distance_intervals"]

_Array = NDArray[np.float64]

_CHUNK_WEIGHTS = 4_000_000
_DOUBT = 0.25
"""Questions' worth of doubt, half of it each way."""


@dataclass(frozen=True)
class Measured:
    """What was sampled at one setting: one entry per sample in each of the three.

    Attributes:
        correct: 1 or 0, shape (n,).
        tokens: Tokens of the response, shape (n,).
        questions: The question of each sample, n of them.
    """

    correct: ArrayLike
    tokens: ArrayLike
    questions: Sequence[Hashable]


class Distances(NamedTuple):
    """How far a setting lies above (positive) or below (negative) the two lines.

    Attributes:
        chord: Against the chord; None if no ends were named. The ends themselves are at 0.
        hull: Against the hull, which the setting itself may be part of; so never above 0.
    """

    chord: Interval | None
    hull: Interval


def distance_intervals(
    settings: Sequence[Measured],
    ends: tuple[int, int] | None = None,
    *,
    confidence: float = 0.95,
    repeats: int = 4000,
    seed: int = 0,
) -> list[Distances]:
    """Distances of all settings of one system on one task, with intervals.

    The chord's ends and the hull's corners are measured as well, so they are bootstrapped with
    the rest: questions are weighted anew (the Bayesian bootstrap, Rubin 1981), all settings on
    the same questions, and everything is computed again. The percentiles are moved outward so
    that few questions cost what they cost Student's interval (Hesterberg 2015, "What teachers
    should know about the bootstrap", expanded percentile interval). An eighth of a question on
    which the setting alone is right and an eighth on which it alone is wrong are added for the
    chord's interval, so that agreement on all questions does not pass for certainty.

    Args:
        settings: What was sampled at each setting, all on the same questions.
        ends: Indices of the chord's slow and fast end (λ = 0 and λ = 1) in `settings`.
        confidence: Coverage, in (0, 1).
        repeats: Bootstrap repetitions.
        seed: Of the bootstrap; equal seeds give equal intervals.

    Returns:
        One entry per setting, in order. With a single question the intervals are [−1, 1], and
        [−1, 0] for the hull.

    Raises:
        DataError: If there is no setting, or they were not measured on the same questions.
        ConfigError: If `confidence` or `ends` make no sense.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence}.")
    if ends is not None and not all(0 <= end < len(settings) for end in ends):
        raise ConfigError(f"the ends {ends} are not among the {len(settings)} settings.")
    table = _per_question(settings)
    questions = table.shape[-1]
    truth = _heights(np.ones((1, questions)), table, ends, doubt=None)
    if questions == 1:
        return [
            Distances(
                None if ends is None else Interval(-1.0, float(chord), 1.0),
                Interval(-1.0, float(hull), 0.0),
            )
            for chord, hull in truth[:, :, 0].T
        ]
    draws = _bootstrap(table, ends, repeats, seed)
    low, high = np.quantile(draws, _tails(confidence, questions), axis=-1)
    return [
        Distances(
            None if ends is None else _around(low[0, s], truth[0, s, 0], high[0, s], s in ends),
            _around(low[1, s], truth[1, s, 0], high[1, s], False),
        )
        for s in range(len(settings))
    ]


def _chord(tokens: _Array, slow: tuple[_Array, _Array], fast: tuple[_Array, _Array]) -> _Array:
    """Heights of the chord in every repetition, as `chord_height` gives one.

    Args:
        tokens: Where, shape (settings, repetitions).
        slow: Tokens and accuracy of one end, shape (repetitions,) each.
        fast: Tokens and accuracy of the other.
    """
    span = slow[0] - fast[0]
    ends_apart = span != 0
    share = np.clip((tokens - fast[0]) / np.where(ends_apart, span, 1.0), 0.0, 1.0)
    share = np.where(ends_apart, share, 0.5)
    heights: _Array = fast[1] + share * (slow[1] - fast[1])
    return heights


def _hull(tokens: _Array, accuracies: _Array, row: int) -> _Array:
    """Height of the hull at one setting's tokens, in every repetition.

    Args:
        tokens: Mean tokens, shape (settings, repetitions).
        accuracies: Accuracy, the same shape.
        row: The setting.

    Returns:
        Shape (repetitions,).
    """
    at = tokens[row]
    best: _Array = accuracies[row].copy()
    for cheap, low in zip(tokens, accuracies, strict=True):
        within = cheap <= at
        best = np.where(within, np.maximum(best, low), best)
        span = tokens - cheap
        dear = within & (tokens > at)
        share = np.where(dear, (at - cheap) / np.where(dear, span, 1.0), 0.0)
        mixed = np.where(dear, low + share * (accuracies - low), -np.inf)
        best = np.maximum(best, mixed.max(axis=0))
    return best


def _heights(
    weights: _Array, table: _Array, ends: tuple[int, int] | None, doubt: _Array | None
) -> _Array:
    """Distances under weights of the questions.

    Args:
        weights: Shape (repetitions, questions).
        table: Right answers, tokens and number of samples, shape (3, settings, questions).
        ends: As in `distance_intervals`.
        doubt: What the added questions shift the chord's distances by, shape (repetitions,).

    Returns:
        Distance to chord and hull, shape (2, settings, repetitions).
    """
    sums: _Array = np.einsum("rq,ksq->ksr", weights, table, optimize=True)
    right, tokens, samples = sums
    accuracy, tokens = right / samples, tokens / samples
    chord = np.zeros_like(accuracy)
    if ends is not None:
        slow, fast = ((tokens[end], accuracy[end]) for end in ends)
        chord = accuracy - _chord(tokens, slow, fast)
        if doubt is not None:
            chord += doubt
    hull = np.stack([accuracy[row] - _hull(tokens, accuracy, row) for row in range(len(tokens))])
    return np.stack([chord, hull])


def _bootstrap(table: _Array, ends: tuple[int, int] | None, repeats: int, seed: int) -> _Array:
    rng = np.random.default_rng(seed)
    questions = table.shape[-1]
    size = max(1, _CHUNK_WEIGHTS // questions)
    chunks = []
    for start in range(0, repeats, size):
        count = min(size, repeats - start)
        weights = rng.standard_exponential((count, questions))
        up, down = rng.standard_gamma(_DOUBT / 2, (2, count))
        doubt = (up - down) / (weights.sum(axis=1) + up + down)
        chunks.append(_heights(weights, table, ends, doubt))
    return np.concatenate(chunks, axis=-1)


def _tails(confidence: float, questions: int) -> tuple[float, float]:
    """The percentiles to take, with Student's quantile for the normal one."""
    quantile = t_quantile(confidence, questions - 1)
    low = float(ndtr(-quantile * ((questions + 1) / (questions - 1)) ** 0.5))
    return low, 1 - low


def _around(low: float, estimate: float, high: float, end: bool) -> Interval:
    if end:
        return Interval(0.0, 0.0, 0.0)
    return Interval(float(min(low, estimate)), float(estimate), float(max(high, estimate)))


def _per_question(settings: Sequence[Measured]) -> _Array:
    """Right answers, tokens and samples by setting and question, shape (3, settings, questions)."""
    if not settings:
        raise DataError("there are no settings to measure distances of.")
    names = sorted(set(settings[0].questions), key=repr)
    place = {question: index for index, question in enumerate(names)}
    table = np.zeros((3, len(settings), len(names)))
    for row, setting in enumerate(settings):
        only = set(setting.questions) ^ place.keys()
        if only:
            raise DataError(
                f"{len(only)} questions were answered at some settings only (such as "
                f"{next(iter(only))!r}); compare on the questions that all have."
            )
        index = np.fromiter((place[q] for q in setting.questions), np.intp)
        columns = (setting.correct, setting.tokens, np.ones(len(index)))
        for column, values in enumerate(columns):
            table[column, row] = np.bincount(index, np.asarray(values, float), len(names))
    return table
