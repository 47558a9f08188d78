"""One report over the students of several λ: what each became, and what all of them cost."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from flexalign.training.card import table
from flexalign.training.checkpoints import newest_complete, writing
from flexalign.training.hidden_cache import HiddenStateCache
from flexalign.training.run import Outcome, Realignment, one_process, trainer_state

_FIGURES = ("divergence", "kl_reference", "kl_aligned")

HOW = (
    "An online step is reckoned as the step that was measured plus both teachers' passes over its "
    "tokens, at the speed that was measured when the cache was made."
)
"""How the cost of online runs is known without running them."""


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Measures the seconds of a run's optimizer steps."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - self._began

    @property
    def mean(self) -> float | None:
        """Seconds per step; None if no step was taken, as in a run that was done already."""
        return self.seconds / self.steps if self.steps else None


@dataclass(frozen=True)
class Costs:
    """What students from one cache took, beside the same students trained online, in seconds.

    Attributes:
        cache: Both teachers' passes over the data, once.
        training: All steps of all students, as measured.
        online: Of each student, the reckoned seconds of a run of its own with both teachers.
    """

    cache: float
    training: float
    online: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cache_seconds": self.cache,
            "training_seconds": self.training,
            "total_seconds": self.cache + self.training,
            "online_seconds": self.online,
            "online_total_seconds": sum(self.online),
            "single_online_runs": (self.cache + self.training)
            / (sum(self.online) / len(self.online)),
            "how": HOW,
        }


def reckon(
    outcomes: Sequence[Outcome], clocks: Sequence[StepClock], cache: HiddenStateCache | None
) -> Costs | None:
    """Reckon the costs; None without a cache, or if no step of some run was measured."""
    means = [clock.mean for clock in clocks]
    if cache is None or any(mean is None for mean in means):
        return None
    per_token = cache.facts["forward_seconds"] / cache.facts["input_tokens"]
    steps = [(mean or 0.0) * outcome.steps for mean, outcome in zip(means, outcomes, strict=True)]
    return Costs(
        cache=cache.facts["forward_seconds"],
        training=sum(steps),
        online=[
            seconds + per_token * outcome.tokens_seen
            for seconds, outcome in zip(steps, outcomes, strict=True)
        ],
    )


def write_report(
    folder: Path,
    runs: Sequence[Realignment],
    outcomes: Sequence[Outcome],
    clocks: Sequence[StepClock],
    cache: HiddenStateCache | None,
) -> dict[str, Any]:
    """Write ``report.json`` and ``report.md`` beside the students' folders; return the former.

    Of several processes the first one writes.
    """
    students = [
        {"lambda": run.recipe.lam, **outcome.to_json(), **_figures(outcome.output)}
        | {"seconds_per_step": clock.mean}
        for run, outcome, clock in zip(runs, outcomes, clocks, strict=True)
    ]
    costs = reckon(outcomes, clocks, cache)
    report = {
        "teacher": runs[0].recipe.teacher,
        "cache": str(cache.folder) if cache else None,
        "students": students,
        "cost": costs.to_json() if costs else None,
    }
    with one_process() as is_first, writing("the report", folder, remains="all students stand"):
        if is_first:
            text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
            (folder / "report.json").write_text(text, encoding="utf-8")
            (folder / "report.md").write_text(_markdown(report, costs), encoding="utf-8")
    return report


def describe_costs(costs: dict[str, Any], students: int) -> str:
    """Put the costs into one sentence for people."""
    return (
        f"{students} students took {costs['total_seconds']:.3g} s of computing "
        f"({costs['cache_seconds']:.3g} s for the cache, {costs['training_seconds']:.3g} s of "
        f"steps), as much as {costs['single_online_runs']:.3g} single runs with the teachers "
        f"online; {students} of those would take {costs['online_total_seconds']:.3g} s"
    )


def _figures(output: Path) -> dict[str, Any]:
    """The last measured divergence and distances of a run, nats per response token."""
    checkpoint = newest_complete(output).path
    logs = trainer_state(checkpoint)["log_history"] if checkpoint else []
    last: dict[str, Any] = next((row for row in reversed(logs) if "divergence" in row), {})
    return {name: last.get(name) for name in _FIGURES}


def _markdown(report: dict[str, Any], costs: Costs | None) -> str:
    head = ["λ", "steps", *(name.replace("_", " ") for name in _FIGURES)]
    measured = all(student["curve"] for student in report["students"])
    graded = measured and all("accuracy" in student["curve"][-1] for student in report["students"])
    head += (["tokens per answer"] if measured else []) + (["accuracy"] if graded else [])
    head += ["seconds per step", "folder"]
    rows = []
    for student in report["students"]:
        last: dict[str, Any] = student["curve"][-1] if student["curve"] else {}
        row = [f"{student['lambda']:g}", str(student["steps"])]
        row += [_number(student[name], ".4f") for name in _FIGURES]
        row += [f"{last['tokens']:.1f}"] if measured else []
        row += [f"{last['accuracy']:.3f}"] if graded else []
        row += [_number(student["seconds_per_step"], ".3g"), f"`{student['output']}`"]
        rows.append(row)
    parts = ["# Students of several λ", table(head, rows)]
    parts.append("Divergence and KL to either model are the last logged, in nats per token.")
    if costs:
        parts.append(f"{describe_costs(costs.to_json(), len(rows)).capitalize()}. {HOW}")
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
