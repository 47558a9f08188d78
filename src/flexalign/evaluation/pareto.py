"""Accuracy against tokens, the picture by which a setting is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ParetoCurve", "ParetoPoint", "draw_pareto"]

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")


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
) -> None:
    """Draw points with intervals both ways, and curves behind them, into a picture.

    Args:
        path: Where to write; the ending chooses the format.
        points: The measured settings.
        curves: Lines to hold them against.
        title: Above the picture.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for style, curve in zip(("-", "--", ":", "-."), curves, strict=False):
        axes.plot(curve.tokens, curve.accuracies, style, color="#a0aec0", label=curve.label)
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


def _sides(values: list[tuple[float, tuple[float, float]]]) -> list[list[float]]:
    return [
        [max(0.0, middle - low) for middle, (low, _) in values],
        [max(0.0, high - middle) for middle, (_, high) in values],
    ]
