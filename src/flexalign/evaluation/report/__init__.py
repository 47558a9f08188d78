"""The report of one or several sweeps: a page that opens from disk, and a picture for papers."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexalign._storage import write_text
from flexalign.data.files import Row, read_rows
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import DataError
from flexalign.evaluation.frontier import (
    ParetoPoint,
    Point,
    dial_ends,
    draw_pareto,
    frontier,
    mixture_lines,
)
from flexalign.evaluation.report.budget import (
    BudgetCurve,
    Scored,
    budget_caps,
    hard_budget,
    score_by_budget,
    split_gain,
)
from flexalign.evaluation.systems import row_label, tell_apart

__all__ = [
    "STATUSES",
    "Key",
    "Run",
    "Samples",
    "Setting",
    "render_page",
    "report_payload",
    "settings_by_task",
    "shown_responses",
    "write_report",
]

# Results folders as `flexalign evaluate` writes them, read for the report.
#
# Responses may fill gigabytes, so a file is gone through once for the figures of every sample and
# a second time only for the few responses that are shown.

_FIELDS = ("system", "setting", "task", "question", "sample", "tokens", "status")


class Key(NamedTuple):
    """What a row of a summary and a sample have in common."""

    system: str
    setting: str
    task: str


@dataclass
class Samples:
    """Figures of one setting's samples on one task, in the order of the file."""

    questions: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)

    def scored(self) -> Scored:
        """The same as arrays, for scoring by budget."""
        statuses = np.array(self.statuses)
        return Scored(
            tokens=np.array(self.tokens, dtype=np.int64),
            correct=statuses == "correct",
            cut=statuses == "truncated",
            questions=self.questions,
        )


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        folder: Where it lies.
        label: What tells it from other runs in the same report; empty for a run by itself.
    """

    folder: Path
    label: str = ""

    @classmethod
    def open_all(cls, folders: Sequence[Path]) -> list["Run"]:
        """Open one or several folders, labelled by as much of their path as tells them apart.

        Raises:
            DataError: If there is no folder, one twice, or one without results.
        """
        if not folders:
            raise DataError("a report needs at least one results folder.")
        resolved = [folder.resolve() for folder in folders]
        if len(set(resolved)) < len(resolved):
            raise DataError("the same results folder is given twice; give each once.")
        labels = tell_apart(resolved) if len(folders) > 1 else [""]
        runs = [cls(folder, label) for folder, label in zip(folders, labels, strict=True)]
        for run in runs:
            run.require()
        return runs

    def require(self) -> None:
        """Check that the folder holds results.

        Raises:
            DataError: If a file is missing.
        """
        for name in ("summary.json", "questions.jsonl", "samples.jsonl"):
            if not (self.folder / name).is_file():
                raise DataError(
                    f"{self.folder} has no {name}; give a folder that `flexalign evaluate "
                    "--output` has finished."
                )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`."""
        return self._json("summary.json", ("rows", "means", "environment"))

    @cached_property
    def questions(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Rows of `questions.jsonl` by (task, question)."""
        rows = self._rows("questions.jsonl", ("task", "question", "problem", "gold"))
        return {(row["task"], row["question"]): row for row in rows}

    @cached_property
    def samples(self) -> dict[Key, Samples]:
        """Figures of all samples by setting and task."""
        found: dict[Key, Samples] = {}
        for row in self.responses():
            samples = found.setdefault(Key(row["system"], row["setting"], row["task"]), Samples())
            samples.questions.append(row["question"])
            samples.tokens.append(int(row["tokens"] or 0))
            samples.statuses.append(row["status"])
        return found

    def responses(self) -> Iterator[dict[str, Any]]:
        """Go through the rows of `samples.jsonl`."""
        yield from self._rows("samples.jsonl", _FIELDS)

    def _rows(self, name: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        path = self.folder / name
        for row in read_rows(path):
            if not isinstance(row, Row):
                raise DataError(
                    f"{path}, {row.place}: {row.reason}; run `flexalign evaluate` again with the "
                    "same arguments, which mends the file."
                )
            missing = [field for field in fields if field not in row.value]
            if missing:
                raise DataError(f"{path}, {row.place}: the field {missing[0]!r} is missing.")
            yield row.value

    def _json(self, name: str, fields: Sequence[str]) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); evaluate again.") from None
        missing = [field for field in fields if field not in value]
        if missing:
            raise DataError(f"{path}: the field {missing[0]!r} is missing; evaluate again.")
        return dict(value)


# The responses that the page shows: a share of them, chosen so that settings can be compared.
#
# One sample of every question under every setting comes before a second sample of any, and either
# all settings of a question are there or none, so that the page compares like with like.


def shown_responses(
    tasks: Mapping[str, Sequence[tuple[Run, Key]]], questions: int, megabytes: float
) -> dict[str, Any]:
    """Choose responses and read them.

    Args:
        tasks: The settings of each task, in the order in which the page numbers them.
        questions: How many questions at most, shared evenly by the tasks.
        megabytes: How much text at most.

    Returns:
        ``questions``: of each its task, id, problem, known answer and ``responses``, each with
        the number of its setting; ``shown`` and ``total``: numbers of questions and responses.
    """
    chosen = {
        place
        for task, settings in tasks.items()
        for place in _chosen_questions(task, settings, max(1, questions // len(tasks)))
    }
    rounds = _rounds(tasks, chosen, int(megabytes * 1e6))
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for run in _runs(tasks):
        numbers = _numbers(tasks, run)
        for row in run.responses():
            place = (row["task"], row["question"])
            number = numbers.get(Key(row["system"], row["setting"], row["task"]))
            if number is None or row["sample"] >= rounds.get(place, 0):
                continue
            entry = shown.setdefault(place, _question(run, place))
            entry["responses"].append(_response(number, row))
    for entry in shown.values():
        entry["responses"].sort(key=lambda response: (response["setting"], response["sample"]))
    everything = {
        (task, question)
        for task, settings in tasks.items()
        for run, key in settings
        if key in run.samples
        for question in run.samples[key].questions
    }
    return {
        "questions": list(shown.values()),
        "shown": [len(shown), sum(len(entry["responses"]) for entry in shown.values())],
        "total": [
            len(everything),
            sum(len(s.questions) for r in _runs(tasks) for s in r.samples.values()),
        ],
    }


def _chosen_questions(
    task: str, settings: Sequence[tuple[Run, Key]], limit: int
) -> list[tuple[str, str]]:
    """The first questions of a task that every setting has, else the first that any has."""
    asked = [
        list(dict.fromkeys(run.samples[key].questions))
        for run, key in settings
        if key in run.samples
    ]
    if not asked:
        return []
    common = set.intersection(*map(set, asked))
    pool = dict.fromkeys(question for part in asked for question in part)
    return [(task, question) for question in sorted(pool, key=lambda q: q not in common)[:limit]]


def _rounds(
    tasks: Mapping[str, Sequence[tuple[Run, Key]]], chosen: set[tuple[str, str]], budget: int
) -> dict[tuple[str, str], int]:
    """How many samples of each chosen question fit, all settings of a question together."""
    sizes: dict[tuple[int, str, str], int] = {}
    for run in _runs(tasks):
        for row in run.responses():
            place = (row["task"], row["question"])
            if place in chosen:
                size = len(row["response"].encode("utf-8", "replace"))
                where = (int(row["sample"]), *place)
                sizes[where] = sizes.get(where, 0) + size
    rounds: dict[tuple[str, str], int] = {}
    for sample, task, question in sorted(sizes, key=lambda where: where[0]):
        budget -= sizes[sample, task, question]
        if budget < 0 and rounds:
            break
        rounds[task, question] = sample + 1
    return rounds


def _runs(tasks: Mapping[str, Sequence[tuple[Run, Key]]]) -> list[Run]:
    return list({run.folder: run for settings in tasks.values() for run, _ in settings}.values())


def _numbers(tasks: Mapping[str, Sequence[tuple[Run, Key]]], run: Run) -> dict[Key, int]:
    return {
        key: number
        for settings in tasks.values()
        for number, (other, key) in enumerate(settings)
        if other.folder == run.folder
    }


def _question(run: Run, place: tuple[str, str]) -> dict[str, Any]:
    row = run.questions.get(place, {"problem": "", "gold": ""})
    return {
        "task": place[0],
        "id": place[1],
        "problem": row["problem"],
        "gold": row["gold"],
        "responses": [],
    }


def _response(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    parts = ThinkingTags().split(row["response"], opened=bool(row.get("thinking_tokens")))
    return {
        "setting": number,
        "sample": row["sample"],
        "status": row["status"],
        "tokens": row["tokens"],
        "thinkingTokens": row.get("thinking_tokens"),
        "route": row.get("route"),
        "extracted": row.get("extracted"),
        "thinking": parts.thinking,
        "answer": parts.answer,
        "closed": parts.closed,
    }


# What the page shows, as one JSON value: figures are made here, the page only draws them.

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
    write_text(page, render_page(payload), errors="backslashreplace")
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
