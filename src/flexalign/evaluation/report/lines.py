"""The lines of a Pareto picture: the frontier of what was measured, chords, and the hull."""

from collections.abc import Mapping, Sequence
from typing import Any

from flexalign.evaluation.chord import Point, upper_hull

__all__ = ["dial_ends", "frontier", "mixture_lines"]


def frontier(points: Sequence[Point]) -> set[int]:
    """Which settings no other one beats: with fewer tokens at no lower accuracy, or better at no more."""
    return {
        index
        for index, point in enumerate(points)
        if not any(
            other != point and other.tokens <= point.tokens and other.accuracy >= point.accuracy
            for other in points
        )
    }


def dial_ends(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Where λ = 0 and λ = 1 stand among the rows of one series; None unless both are there."""
    places = {row["lambda"]: index for index, row in enumerate(rows) if row["lambda"] in (0, 1)}
    return (places[0], places[1]) if len(places) == 2 else None


def mixture_lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point] | None]:
    """Corners of the chord (None without both ends) and of the hull of one series."""
    points = [Point(float(row["tokens"]), float(row["accuracy"])) for row in rows]
    ends = dial_ends(rows)
    hull = upper_hull(points)
    hull.append(Point(max(point.tokens for point in points), hull[-1].accuracy))
    return {"chord": [points[end] for end in ends] if ends else None, "hull": hull}
