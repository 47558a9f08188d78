"""The report of one or several sweeps: a page that opens from disk, and a picture for papers."""

import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from flexalign.evaluation.labels import row_label
from flexalign.evaluation.pareto import ParetoPoint, draw_pareto
from flexalign.evaluation.report.lines import dial_ends
from flexalign.evaluation.report.payload import Setting, report_payload, settings_by_task
from flexalign.evaluation.report.runs import Run

__all__ = ["render_page", "write_report"]

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
    opened = Run.open_all(runs)
    payload = report_payload(opened, questions, megabytes)
    output.mkdir(parents=True, exist_ok=True)
    page = output / "report.html"
    # A lone surrogate, which UTF-8 cannot hold, becomes the JSON escape that stands for it.
    page.write_text(render_page(payload), encoding="utf-8", errors="backslashreplace")
    for number, (task, settings) in enumerate(settings_by_task(opened).items()):
        suffix = "-" + re.sub(r"[^\w.-]+", "_", task) if number else ""
        _draw(output / f"pareto{suffix}.png", task, settings)
    return page


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


def _draw(path: Path, task: str, settings: Sequence[Setting]) -> None:
    points = [_point(setting) for setting in settings]
    ends = []
    for series in dict.fromkeys(setting.series for setting in settings):
        members = [index for index, setting in enumerate(settings) if setting.series == series]
        found = dial_ends([settings[index].row for index in members])
        if found:
            ends.append((points[members[found[0]]], points[members[found[1]]]))
    draw_pareto(path, points, title=task, ends=ends)


def _point(setting: Setting) -> ParetoPoint:
    row = setting.row
    return ParetoPoint(
        label=row_label(row),
        group=setting.series,
        tokens=row["tokens"],
        tokens_interval=_closed(row["tokens_ci"], row["tokens"]),
        accuracy=row["accuracy"],
        accuracy_interval=_closed(row["accuracy_ci"], row["accuracy"]),
    )


def _closed(interval: Sequence[float | None] | None, estimate: float) -> tuple[float, float]:
    """The interval, each open or unknown end drawn as the estimate itself."""
    low, high = interval or (None, None)
    return (estimate if low is None else low, estimate if high is None else high)
