"""The page and its pictures: figures are made here, as one JSON value; the page only draws them."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from flexalign._storage import write_text
from flexalign.evaluation.frontier import (
    ParetoPoint,
    dial_ends,
    draw_pareto,
    frontier,
    mixture_lines,
)
from flexalign.evaluation.report.budget import (
    BudgetCurve,
    budget_caps,
    hard_budget,
    score_by_budget,
    split_gain,
)
from flexalign.evaluation.report.responses import shown_responses
from flexalign.evaluation.report.runs import ReportRun, RowKey
from flexalign.evaluation.samples import Samples
from flexalign.evaluation.students import sweep_students, training_notes
from flexalign.evaluation.summary import SummaryRow
from flexalign.statistics import Interval

STATUSES = ("correct", "wrong", "unparsed", "no_answer", "truncated")
_BINS = 48
_SCRIPTS = ("base", "scales", "table", "figures", "budget", "responses", "main")


def write_report(
    runs: Sequence[Path], output: Path, *, questions: int = 200, megabytes: float = 20.0
) -> Path:
    """Write ``report.html`` and ``pareto.png`` from results folders.

    The page needs nothing beside it: style, script and figures are in it and it fetches nothing.
    With several tasks the picture of the first is ``pareto.png`` and those of the others are
    ``pareto-TASK.png``.

    Args:
        runs: Folders that `flexalign evaluate` has finished; several go into one report.
        output: The folder to write into; made if it is not there.
        questions: How many questions at most have their responses in the page.
        megabytes: How much text of responses at most.

    Returns:
        The page.

    Raises:
        DataError: If a folder has no results, or a file in it is damaged.
    """
    opened = ReportRun.open_all(runs)
    payload = report_payload(opened, questions, megabytes)
    output.mkdir(parents=True, exist_ok=True)
    page = output / "report.html"
    # A lone surrogate, which UTF-8 cannot hold, becomes the JSON escape that stands for it.
    write_text(page, render_page(payload), errors="backslashreplace")
    for number, (task, settings) in enumerate(settings_by_task(opened).items()):
        suffix = "-" + re.sub(r"[^\w.-]+", "_", task) if number else ""
        _draw(output / f"pareto{suffix}.png", task, settings)
    return page


@dataclass(frozen=True)
class ReportSetting:
    """One measured setting on one task.

    Attributes:
        run: The run it comes from.
        series: Its system, with the run in front where a report holds several.
        row: Its row of the summary.
    """

    run: ReportRun
    series: str
    row: SummaryRow

    @property
    def key(self) -> RowKey:
        """Which samples are its own."""
        return RowKey.of(self.row)


def settings_by_task(runs: Sequence[ReportRun]) -> dict[str, list[ReportSetting]]:
    """All settings of all runs, by task; those of one series together, λ rising, policies last."""
    found: dict[str, list[ReportSetting]] = {}
    for run in runs:
        for row in run.summary.rows:
            series = " · ".join(part for part in (run.label, row.system) if part)
            found.setdefault(row.task, []).append(ReportSetting(run, series, row))
    for task, settings in found.items():
        order = list(dict.fromkeys(setting.series for setting in settings))
        found[task] = sorted(settings, key=lambda setting: _place(order, setting))
    return found


def _place(order: Sequence[str], setting: ReportSetting) -> tuple[int, bool, float]:
    lam = setting.row.lam
    return order.index(setting.series), lam is None, 0.0 if lam is None else lam


def _rows_by_series(settings: Sequence[ReportSetting]) -> dict[str, list[SummaryRow]]:
    found: dict[str, list[SummaryRow]] = {}
    for setting in settings:
        found.setdefault(setting.series, []).append(setting.row)
    return found


def report_payload(runs: Sequence[ReportRun], questions: int, megabytes: float) -> dict[str, Any]:
    """Assemble everything that the page draws.

    Args:
        runs: The results folders.
        questions: How many questions at most have their responses in the page.
        megabytes: How much text of responses at most.
    """
    tasks, notes = settings_by_task(runs), _notes(runs)
    return {
        **({"notes": notes} if notes else {}),
        "statuses": STATUSES,
        "tasks": [_task(name, settings) for name, settings in tasks.items()],
        "means": [
            {"run": run.label, "label": mean.label, **mean.to_json()}
            for run in runs
            for mean in run.summary.means
        ],
        "runs": [
            {
                "label": run.label or run.folder.name,
                "environment": run.summary.environment,
            }
            for run in runs
        ],
        "responses": shown_responses(
            {task: [(s.run, s.key) for s in settings] for task, settings in tasks.items()},
            questions,
            megabytes,
        ),
    }


def _notes(runs: Sequence[ReportRun]) -> list[str]:
    """What a reader must know: the notes of each run, and what only the runs together show."""
    found: list[str] = []
    students: dict[str, Path] = {}
    for run in runs:
        environment = run.summary.environment
        found += (environment or {}).get("notes", ())
        students |= sweep_students(run.label, environment)
    if len(runs) > 1:
        found += training_notes(students)
    return found


def _task(name: str, settings: Sequence[ReportSetting]) -> dict[str, Any]:
    samples = [setting.run.samples.get(setting.key) for setting in settings]
    lengths = [part.tokens for part in samples if part is not None]
    longest = max((int(part.max()) for part in lengths), default=1)
    shortest = min((int(np.quantile(part, 0.02)) for part in lengths), default=1)
    caps = budget_caps(longest, shortest)
    edges = _edges(longest)

    curves = [score_by_budget(part, caps) if part is not None else None for part in samples]
    best = frontier([setting.row.point for setting in settings])

    members = []
    for index, setting in enumerate(settings):
        reference = _reference(settings, index)
        members.append(
            {
                "series": setting.series,
                "row": {"label": setting.row.label, **setting.row.to_json()},
                "frontier": index in best,
                "reference": reference,
                "histogram": _histogram(samples[index], edges),
                "budget": _budget(index, reference, curves, samples),
            }
        )

    return {
        "name": name,
        "settings": members,
        "edges": edges,
        "caps": caps,
        "lines": [
            {"series": series, **mixture_lines([row.point for row in rows], [r.lam for r in rows])}
            for series, rows in _rows_by_series(settings).items()
        ],
    }


def _reference(settings: Sequence[ReportSetting], index: int) -> int | None:
    """Where the λ = 0 of the same series stands, unless it is this one."""
    for place, other in enumerate(settings):
        if other.series == settings[index].series and other.row.lam == 0:
            return place if place != index else None
    return None


def _budget(
    index: int,
    reference: int | None,
    curves: Sequence[BudgetCurve | None],
    samples: Sequence[Samples | None],
) -> dict[str, Any] | None:
    curve, own = curves[index], samples[index]
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

    # The two that need a reference are left out without one.
    if reference is None:
        return result
    base, base_samples = curves[reference], samples[reference]
    if base is None or base_samples is None:
        return result

    parts = split_gain(curve, base)
    result["gain"] = [[part.no_longer_cut, part.better_answers] for part in parts]
    if budget := hard_budget(own, base_samples):
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
    return {
        status: np.histogram(samples.tokens[samples.status == status], bins=edges)[0].tolist()
        for status in STATUSES
    }


def render_page(payload: Any) -> str:
    """The page around a payload, as `report_payload` makes it.

    Every ``<`` in the data is written as an escape, so that no text of a model can end the
    element that holds it.
    """
    folder = files(__package__) / "page"
    scripts = [(folder / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    text = json.dumps(_finite(payload), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = {
        "style": (folder / "report.css").read_text(encoding="utf-8"),
        "data": text.replace("<", "\\u003c"),
        "script": '"use strict";\n(() => {\n' + "\n".join(scripts) + "})();",
    }
    template = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub("<!--(style|data|script)-->", lambda match: parts[match[1]], template)


def _finite(value: Any) -> Any:
    """JSON knows no infinity; an open end of an interval is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _draw(path: Path, task: str, settings: Sequence[ReportSetting]) -> None:
    points = [_point(setting) for setting in settings]
    ends = []
    for series, rows in _rows_by_series(settings).items():
        found = dial_ends([row.lam for row in rows])
        if found:
            own = [
                p for p, setting in zip(points, settings, strict=True) if setting.series == series
            ]
            ends.append((own[found[0]], own[found[1]]))
    draw_pareto(path, points, title=task, ends=ends)


def _point(setting: ReportSetting) -> ParetoPoint:
    row = setting.row
    return ParetoPoint(
        label=row.label,
        group=setting.series,
        tokens=row.tokens.mean,
        tokens_interval=_closed(row.tokens),
        accuracy=row.accuracy.mean,
        accuracy_interval=_closed(row.accuracy),
    )


def _closed(interval: Interval) -> tuple[float, float]:
    """The interval's ends, each unknown one drawn as the estimate itself."""
    low, estimate, high = interval
    return (
        low if math.isfinite(low) else estimate,
        high if math.isfinite(high) else estimate,
    )
