"""Compares a dial with routing: the line between its ends, and the hull of all mixtures.

Routing each question at random to one of two settings reaches every point on the straight line
between them, in tokens and in accuracy. The line between a dial's ends, its *chord*, therefore
needs no dial, and a setting is only useful above it. The *hull* is the best that mixtures of the
measured settings reach. Distances are vertical: differences of accuracy at equal tokens.

This module has, in this order: the two lines from points, distances to them with intervals, and the
Pareto plot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.samples import Samples
from flexalign.statistics import Interval, t_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Array = NDArray[np.float64]

_CHUNK_WEIGHTS = 4_000_000
"""Largest number of question weights that one step of the bootstrap holds in memory."""

_DOUBT = 0.25
"""Weight of the questions added for the chord's interval, half of it in each direction."""

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568", "#b7791f", "#319795")


class Point(NamedTuple):
    """A setting as a point of a Pareto plot.

    Attributes:
        tokens: Mean tokens of a response.
        accuracy: Share of right answers, 0…1 (or in points; distances are in the same unit).
    """

    tokens: float
    accuracy: float


def chord_height(tokens: float, slow: Point, fast: Point) -> float:
    """Return the accuracy of random routing between two settings at the given mean tokens.

    Below the fewest or above the most tokens of the two, it is the accuracy of the nearer end.
    """
    if slow.tokens == fast.tokens:
        return (slow.accuracy + fast.accuracy) / 2
    left, right = sorted((slow, fast))
    return float(np.interp(tokens, (left.tokens, right.tokens), (left.accuracy, right.accuracy)))


def chord_distance(point: Point, slow: Point, fast: Point) -> float:
    """Return the signed distance of a setting to the chord, in the unit of accuracy."""
    return point.accuracy - chord_height(point.tokens, slow, fast)


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the best mixtures: from fewest tokens to highest accuracy, concave.

    Settings that cost more than the last corner are not on the hull, as none is more accurate.

    Raises:
        DataError: If there are no points.
    """
    if not points:
        raise DataError("a hull needs at least one measured setting.")
    corners: list[Point] = []
    for point in sorted(points, key=lambda p: (p.tokens, -p.accuracy)):
        if corners and point.accuracy <= corners[-1].accuracy:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def hull_height(tokens: float, points: Sequence[Point]) -> float:
    """Return the highest accuracy of mixtures of the points with at most the given mean tokens.

    With fewer tokens than any point, it is the accuracy of the point with the fewest tokens.
    """
    corners = upper_hull(points)
    return float(np.interp(tokens, [p.tokens for p in corners], [p.accuracy for p in corners]))


def hull_distance(point: Point, points: Sequence[Point]) -> float:
    """Return the signed distance of a setting to the hull of `points`, in the unit of accuracy."""
    return point.accuracy - hull_height(point.tokens, points)


def frontier(points: Sequence[Point]) -> set[int]:
    """Return the indices of the Pareto-optimal settings.

    A setting is left out if a different point has no more tokens and no lower accuracy.
    """
    return {
        index
        for index, point in enumerate(points)
        if not any(
            other != point and other.tokens <= point.tokens and other.accuracy >= point.accuracy
            for other in points
        )
    }


def dial_ends(lams: Sequence[float | None]) -> tuple[int, int] | None:
    """Return the indices of λ = 0 and λ = 1 among the settings of a series; None without both.

    Args:
        lams: The λ of each setting; None for a setting that is not a single λ.
    """
    places = {lam: index for index, lam in enumerate(lams) if lam in (0, 1)}
    return (places[0], places[1]) if len(places) == 2 else None


def mixture_lines(
    points: Sequence[Point], lams: Sequence[float | None]
) -> dict[str, list[Point] | None]:
    """Return the corners of the chord and of the hull of a series, under these two keys.

    The chord is None without both ends. The hull continues to the most tokens of all points.

    Args:
        points: The settings of the series, at least one.
        lams: The λ of each, as in :func:`dial_ends`.
    """
    ends = dial_ends(lams)
    hull = upper_hull(points)
    hull.append(Point(max(point.tokens for point in points), hull[-1].accuracy))
    return {"chord": [points[end] for end in ends] if ends else None, "hull": hull}


def _slope(left: Point, right: Point) -> float:
    return (right.accuracy - left.accuracy) / (right.tokens - left.tokens)


# Distances to the two lines, with their intervals.


class Distances(NamedTuple):
    """A setting's distances to the two lines; positive above, negative below.

    Attributes:
        chord: Distance to the chord; None if no ends are given. It is 0 for the ends themselves.
        hull: Distance to the hull of all settings, including this one; so never above 0.
    """

    chord: Interval | None
    hull: Interval


def distance_intervals(
    settings: Sequence[Samples],
    ends: tuple[int, int] | None = None,
    *,
    confidence: float = 0.95,
    repeats: int = 4000,
    seed: int = 0,
) -> list[Distances]:
    """Compute the distances of all settings of one system on one task, with intervals.

    The chord's ends and the hull's corners are estimates too, so they are bootstrapped together
    with the settings: each repetition draws new weights of the questions (the Bayesian bootstrap,
    Rubin 1981), the same for all settings, and computes all distances again. The percentiles are
    moved outward, so that the interval widens with few questions as Student's does (Hesterberg
    2015, "What teachers should know about the bootstrap", expanded percentile interval). For the
    chord's interval, an eighth of a question on which only the setting is right and an eighth on
    which only it is wrong are added, so that the interval keeps a width if all questions agree.

    Args:
        settings: Samples of each setting, all on the same questions.
        ends: Indices of the chord's slow and fast end (λ = 0 and λ = 1) in `settings`.
        confidence: Coverage, in (0, 1).
        repeats: Number of bootstrap repetitions.
        seed: Seed of the bootstrap; equal seeds give equal intervals.

    Returns:
        One entry for each setting, in order. With a single question the intervals are [−1, 1], and
        [−1, 0] for the hull.

    Raises:
        DataError: If there is no setting, or they were not measured on the same questions.
        ConfigError: If `confidence` or `ends` are out of range.
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


def significantly_above(distance: Interval) -> bool:
    """Whether the whole interval is above the line."""
    return distance.low > 0


def significantly_below(distance: Interval) -> bool:
    """Whether the whole interval is below the line."""
    return distance.high < 0


def _chord(tokens: _Array, slow: tuple[_Array, _Array], fast: tuple[_Array, _Array]) -> _Array:
    """Compute the chord's heights in every repetition, as `chord_height` does for one.

    Args:
        tokens: Mean tokens at which the heights are taken, shape (settings, repetitions).
        slow: Tokens and accuracy of the slow end, shape (repetitions,) each.
        fast: Tokens and accuracy of the fast end, shape (repetitions,) each.

    Returns:
        Heights, shape (settings, repetitions).
    """
    span = slow[0] - fast[0]
    ends_apart = span != 0
    share = np.clip((tokens - fast[0]) / np.where(ends_apart, span, 1.0), 0.0, 1.0)
    share = np.where(ends_apart, share, 0.5)
    heights: _Array = fast[1] + share * (slow[1] - fast[1])
    return heights


def _hull(tokens: _Array, accuracies: _Array, row: int) -> _Array:
    """Compute the hull's height at one setting's tokens, in every repetition.

    It is the best of all settings with no more tokens, and of all mixtures of two settings.

    Args:
        tokens: Mean tokens, shape (settings, repetitions).
        accuracies: Accuracy, the same shape.
        row: Index of the setting.

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
    """Compute distances under given weights of the questions.

    Args:
        weights: Shape (repetitions, questions).
        table: Right answers, tokens and number of samples, shape (3, settings, questions).
        ends: As in `distance_intervals`.
        doubt: Shift of the chord's distances by the added questions, shape (repetitions,).

    Returns:
        Distances to chord and hull, shape (2, settings, repetitions).
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
    """Return the expanded percentiles, from Student's quantile in place of the normal one."""
    quantile = t_quantile(confidence, questions - 1)
    low = float(ndtr(-quantile * ((questions + 1) / (questions - 1)) ** 0.5))
    return low, 1 - low


def _around(low: float, estimate: float, high: float, end: bool) -> Interval:
    if end:
        return Interval(0.0, 0.0, 0.0)
    return Interval(float(min(low, estimate)), float(estimate), float(max(high, estimate)))


def _per_question(settings: Sequence[Samples]) -> _Array:
    """Sum right answers, tokens and samples by setting and question.

    Returns:
        Shape (3, settings, questions).

    Raises:
        DataError: If there is no setting, or they were not measured on the same questions.
    """
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
        index = np.fromiter((place[question] for question in setting.question), np.intp)
        columns = (setting.correct, setting.tokens, np.ones(len(index)))
        for column, values in enumerate(columns):
            table[column, row] = np.bincount(index, values, len(names))
    return table


# The Pareto plot: accuracy against tokens.


@dataclass(frozen=True)
class ParetoPoint:
    """One measured setting.

    Attributes:
        label: The text next to the point, such as ``λ=2``.
        group: Points of one group share a colour and an entry of the legend.
        tokens: Mean tokens of a response.
        tokens_interval: Its interval, low and high.
        accuracy: Share of right answers, 0…1.
        accuracy_interval: Its interval, low and high.
    """

    label: str
    group: str
    tokens: float
    tokens_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]


@dataclass(frozen=True)
class ParetoCurve:
    """A curve for comparison with the points, such as a closed form over λ.

    Attributes:
        label: Its entry in the legend.
        tokens: Mean tokens along the curve.
        accuracies: Accuracy along the curve.
    """

    label: str
    tokens: Sequence[float]
    accuracies: Sequence[float]


def draw_pareto(
    path: Path,
    points: Sequence[ParetoPoint],
    curves: Sequence[ParetoCurve] = (),
    title: str = "",
    ends: Sequence[tuple[ParetoPoint, ParetoPoint]] = (),
) -> None:
    """Draw points with both intervals over curves, chords and the hull of all mixtures.

    Args:
        path: The file to write; its suffix sets the format.
        points: The measured settings.
        curves: Curves for comparison.
        title: The title of the plot.
        ends: The two ends of each dial (λ = 0 and λ = 1), whose chord is drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for style, curve in zip(("-", "--", ":", "-."), curves, strict=False):
        axes.plot(curve.tokens, curve.accuracies, style, color="#a0aec0", label=curve.label)
    _draw_mixtures(axes, points, ends)

    groups = list(dict.fromkeys(point.group for point in points))
    for index, group in enumerate(groups):
        members = [point for point in points if point.group == group]
        axes.errorbar(
            [point.tokens for point in members],
            [point.accuracy for point in members],
            xerr=_sides([(p.tokens, p.tokens_interval) for p in members]),
            yerr=_sides([(p.accuracy, p.accuracy_interval) for p in members]),
            fmt="o",
            markersize=5,
            elinewidth=1,
            capsize=2,
            color=_COLOURS[index % len(_COLOURS)],
            label=group,
        )
        for point in members:
            axes.annotate(
                point.label,
                (point.tokens, point.accuracy),
                xytext=(5, 6 if index % 2 == 0 else -12),
                textcoords="offset points",
                fontsize=8,
            )

    axes.set_xlabel("mean tokens a response")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=11)
    axes.legend(loc=_free_corner(points), frameon=False, fontsize=8)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _free_corner(points: Sequence[ParetoPoint]) -> str:
    """Return the right corner for the legend: the lower one, or the upper if it has fewer points."""
    tokens = [point.tokens for point in points]
    accuracies = [point.accuracy for point in points]
    if not points:
        return "lower right"
    right = min(tokens) + 0.6 * (max(tokens) - min(tokens))
    middle = (min(accuracies) + max(accuracies)) / 2
    lower = [point.accuracy < middle for point in points if point.tokens > right]
    return "upper right" if sum(lower) > len(lower) / 2 else "lower right"


def _draw_mixtures(
    axes: "Axes",
    points: Sequence[ParetoPoint],
    ends: Sequence[tuple[ParetoPoint, ParetoPoint]],
) -> None:
    """Draw the chords, and the hull of all mixtures."""
    for number, pair in enumerate(ends):
        axes.plot(
            [point.tokens for point in pair],
            [point.accuracy for point in pair],
            linestyle=(0, (6, 3)),
            linewidth=1,
            color="#718096",
            label="chord: a coin between the ends" if number == 0 else None,
        )

    if len(points) > 1:
        corners = upper_hull([Point(point.tokens, point.accuracy) for point in points])
        corners.append(Point(max(point.tokens for point in points), corners[-1].accuracy))
        axes.plot(
            [corner.tokens for corner in corners],
            [corner.accuracy for corner in corners],
            linestyle=(0, (1, 2)),
            linewidth=1.2,
            color="#4a5568",
            label="hull of all mixtures",
        )


def _sides(values: list[tuple[float, tuple[float, float]]]) -> list[list[float]]:
    return [
        [max(0.0, middle - low) for middle, (low, _) in values],
        [max(0.0, high - middle) for middle, (_, high) in values],
    ]
