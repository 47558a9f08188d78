"""What the page shows, as one JSON value: figures are made here, the page only draws them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexalign.evaluation.chord import Point
from flexalign.evaluation.labels import row_label
from flexalign.evaluation.report.budget import (
    BudgetCurve,
    Scored,
    budget_caps,
    hard_budget,
    score_by_budget,
    split_gain,
)
from flexalign.evaluation.report.lines import frontier, mixture_lines
from flexalign.evaluation.report.responses import shown_responses
from flexalign.evaluation.report.runs import Key, Run, Samples

__all__ = ["STATUSES", "Setting", "report_payload", "settings_by_task"]

STATUSES = ("correct", "wrong", "unparsed", "no_answer", "truncated")
_BINS = 48


@dataclass(frozen=True)
class Setting:
    """One measured setting on one task.

    Attributes:
        run: The run it comes from.
        series: Its system, with the run in front where a report holds several.
        row: Its row of the summary.
    """

    run: Run
    series: str
    row: Mapping[str, Any]

    @property
    def key(self) -> Key:
        """Which samples are its own."""
        return Key(self.row["system"], self.row["setting"], self.row["task"])

    @property
    def point(self) -> Point:
        """Where it stands in the Pareto picture."""
        return Point(float(self.row["tokens"]), float(self.row["accuracy"]))


def settings_by_task(runs: Sequence[Run]) -> dict[str, list[Setting]]:
    """All settings of all runs, by task; those of one series together, λ rising, policies last."""
    found: dict[str, list[Setting]] = {}
    for run in runs:
        for row in run.summary["rows"]:
            series = " · ".join(part for part in (run.label, row["system"]) if part)
            found.setdefault(row["task"], []).append(Setting(run, series, row))
    for task, settings in found.items():
        order = list(dict.fromkeys(setting.series for setting in settings))
        found[task] = sorted(settings, key=lambda setting: _place(order, setting))
    return found


def report_payload(runs: Sequence[Run], questions: int, megabytes: float) -> dict[str, Any]:
    """Assemble everything that the page draws.

    Args:
        runs: The results folders.
        questions: How many questions at most have their responses in the page.
        megabytes: How much text of responses at most.
    """
    tasks = settings_by_task(runs)
    return {
        "statuses": STATUSES,
        "tasks": [_task(name, settings) for name, settings in tasks.items()],
        "means": [
            {"run": run.label, "label": row_label(mean), **mean}
            for run in runs
            for mean in run.summary["means"]
        ],
        "runs": [
            {
                "label": run.label or run.folder.name,
                "environment": run.summary["environment"],
            }
            for run in runs
        ],
        "responses": shown_responses(
            {task: [(s.run, s.key) for s in settings] for task, settings in tasks.items()},
            questions,
            megabytes,
        ),
    }


def _place(order: Sequence[str], setting: Setting) -> tuple[int, bool, float]:
    lam = setting.row["lambda"]
    return order.index(setting.series), lam is None, 0.0 if lam is None else float(lam)


def _task(name: str, settings: Sequence[Setting]) -> dict[str, Any]:
    samples = [setting.run.samples.get(setting.key) for setting in settings]
    scored = [found.scored() if found else None for found in samples]
    lengths = [part.tokens for part in scored if part is not None]
    longest = max((int(part.max()) for part in lengths), default=1)
    shortest = min((int(np.quantile(part, 0.02)) for part in lengths), default=1)
    caps = budget_caps(longest, shortest)
    edges = _edges(longest)
    curves = [score_by_budget(part, caps) if part is not None else None for part in scored]
    best = frontier([setting.point for setting in settings])
    members = []
    for index, setting in enumerate(settings):
        reference = _reference(settings, index)
        members.append(
            {
                "series": setting.series,
                "row": {"label": row_label(setting.row), **setting.row},
                "frontier": index in best,
                "reference": reference,
                "histogram": _histogram(samples[index], edges),
                "budget": _budget(index, reference, curves, scored),
            }
        )
    return {
        "name": name,
        "settings": members,
        "edges": edges,
        "caps": caps,
        "lines": [
            {"series": series, **mixture_lines([s.row for s in settings if s.series == series])}
            for series in dict.fromkeys(setting.series for setting in settings)
        ],
    }


def _reference(settings: Sequence[Setting], index: int) -> int | None:
    """Where the λ = 0 of the same series stands, unless it is this one."""
    for place, other in enumerate(settings):
        if other.series == settings[index].series and other.row["lambda"] == 0:
            return place if place != index else None
    return None


def _budget(
    index: int,
    reference: int | None,
    curves: Sequence[BudgetCurve | None],
    scored: Sequence[Scored | None],
) -> dict[str, Any] | None:
    curve, own = curves[index], scored[index]
    if curve is None or own is None:
        return None
    result: dict[str, Any] = {
        "accuracy": [part.mean for part in curve.accuracy],
        "low": [part.low for part in curve.accuracy],
        "high": [part.high for part in curve.accuracy],
        "answered": curve.answered,
        "among": [curve.among_answered(place) for place in range(len(curve.caps))],
        "tokens": curve.tokens,
        "gain": None,
        "hard": None,
    }
    if reference is None:
        return result
    base, base_scored = curves[reference], scored[reference]
    if base is None or base_scored is None:
        return result
    parts = split_gain(curve, base)
    result["gain"] = [[part.no_longer_cut, part.better_answers] for part in parts]
    if budget := hard_budget(own, base_scored):
        result["hard"] = {
            "cap": budget.cap,
            "tokens": budget.tokens,
            "accuracy": budget.accuracy,
            "advantage": list(budget.advantage),
        }
    return result


def _edges(longest: int) -> list[int]:
    """Edges of at most `_BINS` bins of equal, whole width from 0 to beyond the longest."""
    width = longest // _BINS + 1
    return list(range(0, longest + width + 1, width))


def _histogram(samples: Samples | None, edges: Sequence[int]) -> dict[str, list[int]] | None:
    if samples is None:
        return None
    lengths, statuses = np.array(samples.tokens), np.array(samples.statuses)
    return {
        status: np.histogram(lengths[statuses == status], bins=edges)[0].tolist()
        for status in STATUSES
    }
