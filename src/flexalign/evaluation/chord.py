"""A dial held against routing: the line between its ends, and the hull of all mixtures.

Sending each question at random to one of two settings gives every point on the line between them,
in tokens and accuracy alike. The line between a dial's ends, its *chord*, is therefore what a
coin reaches without any dial, and a setting is worth having only above it. The *hull* is the best
that mixtures of the measured settings reach. Distances are vertical: accuracy at equal tokens.
:mod:`flexalign.evaluation.chord_intervals` gives them with their uncertainty.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexalign.errors import DataError
from flexalign.evaluation.statistics import Interval

__all__ = [
    "Point",
    "chord_distance",
    "chord_height",
    "hull_distance",
    "hull_height",
    "significantly_above",
    "significantly_below",
    "upper_hull",
]


class Point(NamedTuple):
    """A setting in the plane of a Pareto picture.

    Attributes:
        tokens: Mean tokens a response.
        accuracy: Share of right answers, 0…1 (or in points; distances are in the same unit).
    """

    tokens: float
    accuracy: float


def chord_height(tokens: float, slow: Point, fast: Point) -> float:
    """Accuracy of the coin between two settings at the given mean tokens.

    Beyond the ends no coin goes; there the nearer end's accuracy counts.
    """
    if slow.tokens == fast.tokens:
        return (slow.accuracy + fast.accuracy) / 2
    left, right = sorted((slow, fast))
    return float(np.interp(tokens, (left.tokens, right.tokens), (left.accuracy, right.accuracy)))


def chord_distance(point: Point, slow: Point, fast: Point) -> float:
    """Signed distance of a setting to the chord, in the unit of accuracy."""
    return point.accuracy - chord_height(point.tokens, slow, fast)


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """Corners of the best mixtures: from fewest tokens to highest accuracy, concave.

    Settings that cost more than the last corner are not on the hull, as it beats them for less.

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
    """Highest accuracy that mixtures of the points reach with at most the given mean tokens.

    With fewer tokens than any point has, the accuracy of the cheapest.
    """
    corners = upper_hull(points)
    return float(np.interp(tokens, [p.tokens for p in corners], [p.accuracy for p in corners]))


def hull_distance(point: Point, points: Sequence[Point]) -> float:
    """Signed distance of a setting to the hull of `points`, in the unit of accuracy."""
    return point.accuracy - hull_height(point.tokens, points)


def significantly_above(distance: Interval) -> bool:
    """Whether the whole interval lies above the line."""
    return distance.low > 0


def significantly_below(distance: Interval) -> bool:
    """Whether the whole interval lies below the line."""
    return distance.high < 0


def _slope(left: Point, right: Point) -> float:
    return (right.accuracy - left.accuracy) / (right.tokens - left.tokens)
