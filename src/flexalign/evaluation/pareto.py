"""Accuracy against tokens, the picture by which a setting is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexalign.evaluation.chord import Point, upper_hull

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ParetoCurve", "ParetoPoint", "draw_pareto"]

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568", "#b7791f", "#319795")


@dataclass(frozen=True)
class ParetoPoint:
    """One measured setting.

    Attributes:
        label: Written beside the point, such as ``λ=2``.
        group: Points of one group share a colour and a line of the legend.
        tokens: Mean tokens a response.
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
    """A line to hold the points against, such as a closed form over λ.

    Attributes:
        label: Its line in the legend.
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
    """Draw points with intervals both ways over curves, chords and the hull of all mixtures.

    Args:
        path: Where to write; the ending chooses the format.
        points: The measured settings.
        curves: Lines to hold them against.
        title: Above the picture.
        ends: The two ends of each dial (λ = 0 and λ = 1), whose chord is drawn.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
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
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_mixtures(
    axes: "Axes",
    points: Sequence[ParetoPoint],
    ends: Sequence[tuple[ParetoPoint, ParetoPoint]],
) -> None:
    """What a coin between measured settings reaches; see :mod:`flexalign.evaluation.chord`."""
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
