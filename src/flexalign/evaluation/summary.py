"""``summary.json``: what each setting of each system is worth on each task, with intervals."""

import math
import os
import platform
from collections.abc import Hashable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from flexalign._version import __version__
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.frontier import Distances, Measured, distance_intervals
from flexalign.statistics import Interval, clustered_interval, paired_ratio_interval

# Tokens saved against a reference: on one task, over tasks, and pooled.
#
# A cut is 1 − tokens ÷ reference tokens; 0.6 means that 60 % were saved, a negative cut that more
# were spent.


def token_cut(tokens: float, reference: float) -> float:
    """The cut of one task, from mean tokens.

    Raises:
        DataError: If the reference's tokens are not positive.
    """
    if not reference > 0:
        raise DataError(
            f"a token cut needs a reference that writes something, got {reference} tokens."
        )
    return 1 - tokens / reference


def token_cut_interval(
    tokens: ArrayLike,
    questions: Sequence[Hashable],
    reference_tokens: ArrayLike,
    reference_questions: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval:
    """The cut of one task with its interval: a ratio of means, paired and clustered by question.

    Args:
        tokens: Tokens of each sample, shape (n,).
        questions: The question of each.
        reference_tokens: Tokens of each of the reference's samples, shape (m,).
        reference_questions: The question of each.
        confidence: Coverage, in (0, 1).

    Raises:
        DataError: As for `paired_ratio_interval`.
    """
    ratio = paired_ratio_interval(
        tokens, questions, reference_tokens, reference_questions, confidence
    )
    return Interval(1 - ratio.high, 1 - ratio.mean, 1 - ratio.low)


def token_cut_mean(tokens: Sequence[float], references: Sequence[float]) -> float:
    """The unweighted mean of the tasks' cuts, as the paper's Table 1 gives it.

    Args:
        tokens: Mean tokens on each task.
        references: The reference's mean tokens on each task, in the same order.

    Raises:
        DataError: If there is no task, or a reference writes nothing.
    """
    _check(tokens, references)
    return float(np.mean([token_cut(*pair) for pair in zip(tokens, references, strict=True)]))


def token_cut_pooled(tokens: Sequence[float], references: Sequence[float]) -> float:
    """The cut of the tasks' mean tokens added up, so that long tasks count for more.

    Args:
        tokens: Mean tokens on each task.
        references: The reference's mean tokens on each task, in the same order.

    Raises:
        DataError: If there is no task, or the reference writes nothing.
    """
    _check(tokens, references)
    return token_cut(sum(tokens), sum(references))


def _check(tokens: Sequence[float], references: Sequence[float]) -> None:
    if not tokens or len(tokens) != len(references):
        raise DataError(
            f"token cuts over tasks need one figure each from both, got {len(tokens)} and "
            f"{len(references)}."
        )


_Row = dict[str, Any]


class _Place(NamedTuple):
    system: str
    setting: str


class _Group:
    """All samples of one setting on one task, in an order of their own."""

    def __init__(self, rows: Iterable[_Row]) -> None:
        self.rows = sorted(rows, key=lambda row: (row["question"], row["sample"]))
        self.questions: list[str] = [row["question"] for row in self.rows]
        self.correct = np.array([row["status"] == "correct" for row in self.rows], dtype=float)
        self.tokens = np.array([row["tokens"] for row in self.rows], dtype=float)

    def on(self, questions: set[str]) -> "_Group":
        """The samples on some of the questions."""
        return _Group(row for row in self.rows if row["question"] in questions)

    def share(self, status: str) -> float:
        return float(np.mean([row["status"] == status for row in self.rows]))

    def thinking(self) -> float | None:
        known = [row["thinking_tokens"] for row in self.rows]
        return None if None in known else float(np.mean(np.array(known, dtype=float)))


def summarise(
    configuration: _Row, rows: Sequence[_Row], environments: Sequence[_Row]
) -> dict[str, Any]:
    """Summarise samples; the order of the rows does not matter.

    A token cut is against the same system at λ = 0, or, where a system has no such setting,
    against the baseline that the configuration names. The chord joins a system's λ = 0 and λ = 1.
    Where samples are missing, settings are compared on the questions that all of them have.

    Args:
        configuration: Of the results folder.
        rows: Its samples.
        environments: Versions and machines that made them.

    Raises:
        ConfigError: If there is no sample.
    """
    if not rows:
        raise ConfigError("there is no sample yet to summarise; sample first.")
    lambdas = {_Place(row["system"], row["setting"]): row["lambda"] for row in rows}
    names = [task["name"] for task in configuration["tasks"]]
    efforts = {
        place: setting.get("effort")
        for system in configuration["systems"]
        for setting in system["settings"]
        if (place := _Place(system["name"], setting["id"])) in lambdas
    }
    places = list(efforts)
    sorted_rows: dict[tuple[_Place, str], list[_Row]] = {}
    for row in rows:
        key = (_Place(row["system"], row["setting"]), row["task"])
        sorted_rows.setdefault(key, []).append(row)
    groups = {key: _Group(members) for key, members in sorted_rows.items()}
    references = {
        place: _reference(place, places, lambdas, configuration.get("baseline")) for place in places
    }
    table = []
    for task in names:
        distances = _distances(task, places, lambdas, groups)
        for place in places:
            if (place, task) in groups:
                base = references[place]
                reference = groups.get((base, task)) if base else None
                head = {
                    "system": place.system,
                    "setting": place.setting,
                    "effort": efforts[place],
                    "lambda": lambdas[place],
                    "task": task,
                }
                figures = _figures(groups[place, task], reference)
                table.append(head | figures | distances[place])
    order = {place: index for index, place in enumerate(places)}
    table.sort(key=lambda row: order[_Place(row["system"], row["setting"])])
    return {
        "rows": [_ordered(row) for row in table],
        "means": [
            {
                "system": place.system,
                "setting": place.setting,
                "effort": efforts[place],
                "lambda": lambdas[place],
                **_mean(place, references, groups, names),
            }
            for place in places
        ],
        "environment": _environment(configuration, environments),
    }


def _reference(
    place: _Place, places: list[_Place], lambdas: dict[_Place, float | None], baseline: str | None
) -> _Place | None:
    """What a setting's tokens are held against."""
    for system in (place.system, baseline):
        members = [p for p in places if p.system == system]
        slow = [p for p in members if lambdas[p] == 0]
        if slow:
            return slow[0]
        if system == baseline and members:
            return members[0]
    return None


def _figures(group: _Group, reference: _Group | None) -> _Row:
    accuracy = clustered_interval(group.correct, group.questions, share=True)
    tokens = clustered_interval(group.tokens, group.questions, share=False)
    cut = None if reference is None else _cut(group, reference)
    return {
        "n_questions": len(set(group.questions)),
        "n_samples": len(group.rows),
        "accuracy": accuracy.mean,
        "accuracy_ci": _ends(accuracy),
        "tokens": tokens.mean,
        "tokens_ci": _ends(tokens),
        "thinking_tokens": group.thinking(),
        "token_cut": cut and cut.mean,
        "token_cut_ci": cut and _ends(cut),
        "wrong": group.share("wrong"),
        "truncated": group.share("truncated"),
        "unparsed": group.share("unparsed"),
        "no_answer": group.share("no_answer"),
    }


def _cut(group: _Group, reference: _Group) -> Interval | None:
    shared = set(group.questions) & set(reference.questions)
    group, reference = group.on(shared), reference.on(shared)
    if not shared or not reference.tokens.any():
        return None
    return token_cut_interval(group.tokens, group.questions, reference.tokens, reference.questions)


def _distances(
    task: str,
    places: list[_Place],
    lambdas: dict[_Place, float | None],
    groups: dict[tuple[_Place, str], _Group],
) -> dict[_Place, _Row]:
    """Distances to chord and hull of every setting on one task, system by system."""
    found: dict[_Place, _Row] = {}
    for system in dict.fromkeys(place.system for place in places):
        members = [p for p in places if p.system == system and (p, task) in groups]
        if not members:
            continue
        shared = set.intersection(*(set(groups[p, task].questions) for p in members))
        if not shared:
            found |= {place: _distance_row(None) for place in members}
            continue
        ends = [
            next((i for i, p in enumerate(members) if lambdas[p] == lam), None) for lam in (0, 1)
        ]
        slow, fast = ends
        measured = [_measured(groups[p, task].on(shared)) for p in members]
        intervals = distance_intervals(
            measured, None if slow is None or fast is None else (slow, fast)
        )
        found |= {p: _distance_row(d) for p, d in zip(members, intervals, strict=True)}
    return found


def _measured(group: _Group) -> Measured:
    values: NDArray[np.float64] = group.correct
    return Measured(values, group.tokens, group.questions)


def _distance_row(distances: Distances | None) -> _Row:
    chord = distances and distances.chord
    hull = distances and distances.hull
    return {
        "chord_distance": chord and chord.mean,
        "chord_distance_ci": chord and _ends(chord),
        "hull_distance": hull and hull.mean,
        "hull_distance_ci": hull and _ends(hull),
    }


def _mean(
    place: _Place,
    references: dict[_Place, _Place | None],
    groups: dict[tuple[_Place, str], _Group],
    tasks: list[str],
) -> _Row:
    """Figures over all tasks, each counted once; a cut needs a reference on every task."""
    own = [groups[place, task] for task in tasks if (place, task) in groups]
    reference = references[place]
    pairs = [
        (groups[place, task].tokens.mean(), groups[reference, task].tokens.mean())
        for task in tasks
        if reference and (place, task) in groups and (reference, task) in groups
    ]
    complete = len(pairs) == len(own) and all(base > 0 for _, base in pairs)
    tokens, bases = [[float(pair[i]) for pair in pairs] for i in (0, 1)]
    return {
        "accuracy": float(np.mean([group.correct.mean() for group in own])),
        "token_cut_mean": token_cut_mean(tokens, bases) if complete else None,
        "token_cut_pooled": token_cut_pooled(tokens, bases) if complete else None,
    }


def _environment(configuration: _Row, environments: Sequence[_Row]) -> _Row:
    first, *later = environments
    return first | ({"continued_with": later} if later else {}) | {"run": configuration}


def _ends(interval: Interval) -> list[float | None]:
    """The interval's ends; None for one that is not known, as with a single question."""
    return [float(end) if math.isfinite(end) else None for end in (interval.low, interval.high)]


_KEYS = (
    "system", "setting", "effort", "lambda", "task", "n_questions", "n_samples", "accuracy",
    "accuracy_ci", "tokens", "tokens_ci", "thinking_tokens", "token_cut", "token_cut_ci",
    "chord_distance", "chord_distance_ci", "hull_distance", "hull_distance_ci", "wrong",
    "truncated", "unparsed", "no_answer",
)  # fmt: skip


def _ordered(row: _Row) -> _Row:
    return {key: row[key] for key in _KEYS}


# Where figures were measured: versions and machine, nothing that names a person or a host.

_PACKAGES = ("torch", "transformers", "peft", "math-verify", "numpy", "vllm")


def environment() -> dict[str, Any]:
    """Describe this process: flexalign, Python, packages, system, processor and accelerator."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "flexalign": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
