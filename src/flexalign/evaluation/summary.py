"""``summary.json``: the accuracy and the tokens of each setting on each task, with intervals.

A *token cut* is 1 − tokens ÷ reference tokens: 0.6 means that 60 % were saved, and a negative cut
that more were spent. Over several tasks there are two definitions, :func:`token_cut_mean` and
:func:`token_cut_pooled`.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from flexalign._version import __version__
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.frontier import Distances, Point, distance_intervals
from flexalign.evaluation.samples import Samples
from flexalign.evaluation.students import sweep_students, training_notes
from flexalign.evaluation.systems import tell_apart
from flexalign.lambdas import Exit, setting_label
from flexalign.statistics import Interval

_STATUSES = ("wrong", "truncated", "unparsed", "no_answer")
_PACKAGES = ("torch", "transformers", "peft", "math-verify", "numpy", "vllm")


@dataclass(frozen=True)
class SummaryRow:
    """The figures of one setting of one system on one task.

    An unknown end of an interval, as with a single question, is infinite here and null in the
    file.

    Attributes:
        system: The system's name.
        setting: The setting's id.
        effort: The requested effort; None if the setting itself was requested.
        lam: λ, if the setting is one number; else None.
        task: The task's name.
        n_questions: Number of questions that were answered.
        n_samples: Number of samples.
        accuracy: Share of right answers.
        tokens: Mean tokens of a response.
        thinking_tokens: Mean thinking tokens; None if they are not known for every sample.
        token_cut: Token cut against λ = 0 or the baseline; None without either.
        chord_distance: Accuracy above the chord; None without both ends.
        hull_distance: Accuracy above the hull of all mixtures; None if no question was answered
            at all settings.
        wrong: Share of the samples with a wrong answer.
        truncated: Share of the samples cut off by the limit on tokens.
        unparsed: Share of the samples whose answer could not be parsed.
        no_answer: Share of the samples without an answer.
    """

    system: str
    setting: str
    effort: float | None
    lam: float | None
    task: str
    n_questions: int
    n_samples: int
    accuracy: Interval
    tokens: Interval
    thinking_tokens: float | None
    token_cut: Interval | None
    chord_distance: Interval | None
    hull_distance: Interval | None
    wrong: float
    truncated: float
    unparsed: float
    no_answer: float

    @property
    def label(self) -> str:
        """The setting's name in tables, after the effort if there is one."""
        return setting_label(self.setting, self.effort)

    @property
    def point(self) -> Point:
        """Its tokens and accuracy, as a point of the Pareto plot."""
        return Point(self.tokens.mean, self.accuracy.mean)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "SummaryRow":
        """Read one row of the file.

        Raises:
            KeyError: If a key is missing.
        """
        return cls(
            system=given["system"],
            setting=given["setting"],
            effort=given.get("effort"),  # missing in files of the first versions
            lam=given["lambda"],
            task=given["task"],
            n_questions=given["n_questions"],
            n_samples=given["n_samples"],
            accuracy=Interval.from_json(given, "accuracy"),
            tokens=Interval.from_json(given, "tokens"),
            thinking_tokens=given["thinking_tokens"],
            token_cut=_optional_interval(given, "token_cut"),
            chord_distance=_optional_interval(given, "chord_distance"),
            hull_distance=_optional_interval(given, "hull_distance"),
            **{status: given[status] for status in _STATUSES},
        )

    def to_json(self) -> dict[str, Any]:
        """Return one row of the file, with keys in the file's order."""
        return {
            "system": self.system,
            "setting": self.setting,
            "effort": self.effort,
            "lambda": self.lam,
            "task": self.task,
            "n_questions": self.n_questions,
            "n_samples": self.n_samples,
            **self.accuracy.to_json("accuracy"),
            **self.tokens.to_json("tokens"),
            "thinking_tokens": self.thinking_tokens,
            **_optional_keys("token_cut", self.token_cut),
            **_optional_keys("chord_distance", self.chord_distance),
            **_optional_keys("hull_distance", self.hull_distance),
            **{status: getattr(self, status) for status in _STATUSES},
        }


@dataclass(frozen=True)
class SummaryMean:
    """The figures of one setting of one system over all tasks, each task counted once.

    Attributes:
        system: The system's name.
        setting: The setting's id.
        effort: The requested effort; None if the setting itself was requested.
        lam: λ, if the setting is one number; else None.
        accuracy: Mean of the tasks' accuracies.
        token_cut_mean: Mean of the tasks' cuts; None without a reference on every task.
        token_cut_pooled: Cut of the sum of the tasks' mean tokens; None without a reference on
            every task.
    """

    system: str
    setting: str
    effort: float | None
    lam: float | None
    accuracy: float
    token_cut_mean: float | None
    token_cut_pooled: float | None

    @property
    def label(self) -> str:
        """The setting's name in tables, after the effort if there is one."""
        return setting_label(self.setting, self.effort)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "SummaryMean":
        """Read one mean of the file.

        Raises:
            KeyError: If a key is missing.
        """
        return cls(
            given["system"],
            given["setting"],
            given.get("effort"),
            given["lambda"],
            given["accuracy"],
            given["token_cut_mean"],
            given["token_cut_pooled"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return one mean of the file, with keys in the file's order."""
        return {
            "system": self.system,
            "setting": self.setting,
            "effort": self.effort,
            "lambda": self.lam,
            "accuracy": self.accuracy,
            "token_cut_mean": self.token_cut_mean,
            "token_cut_pooled": self.token_cut_pooled,
        }


@dataclass(frozen=True)
class Summary:
    """The contents of ``summary.json``.

    Attributes:
        rows: One for each setting of each system on each task.
        means: One for each setting of each system, over all tasks.
        environment: Versions and machine of the sweep, its configuration under ``run`` and, where
            a reader must know something, ``notes``; of several sweeps, None or the notes alone.
    """

    rows: tuple[SummaryRow, ...]
    means: tuple[SummaryMean, ...]
    environment: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Summary":
        """Read the file's value.

        Raises:
            KeyError: If a key is missing.
        """
        return cls(
            tuple(SummaryRow.from_json(row) for row in given["rows"]),
            tuple(SummaryMean.from_json(mean) for mean in given["means"]),
            given.get("environment"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the file's value; ``environment`` is left out if it is None."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "means": [mean.to_json() for mean in self.means],
            **({} if self.environment is None else {"environment": dict(self.environment)}),
        }


def _optional_interval(given: Mapping[str, Any], name: str) -> Interval | None:
    return None if given[name] is None else Interval.from_json(given, name)


def _optional_keys(name: str, value: Interval | None) -> dict[str, Any]:
    return {name: None, f"{name}_ci": None} if value is None else value.to_json(name)


# A summary from samples.


class _SettingPlace(NamedTuple):
    """A setting of a system that has samples."""

    system: str
    setting: str
    effort: float | None
    lam: float | None


_Groups = Mapping[tuple[_SettingPlace, str], Samples]
"""The samples of each setting on each task."""


def summarise(
    configuration: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    environments: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> Summary:
    """Summarise samples; the order of the rows does not matter.

    The reference of a token cut is the same system at λ = 0 or, if a system has no such setting,
    the configuration's baseline. The chord joins λ = 0 and λ = 1 of a system. If samples are
    missing, settings are compared on the questions that all of them have.

    Args:
        configuration: The configuration of the results folder.
        rows: The samples, as lines of ``samples.jsonl``.
        environments: Versions and machines that made them, the first one first.
        notes: What a reader must know, for the environment, where what the samples show is added.

    Raises:
        ConfigError: If there are no samples.
    """
    if not rows:
        raise ConfigError("there is no sample yet to summarise; sample first.")

    places = _places(configuration, rows)
    tasks = [task["name"] for task in configuration["tasks"]]
    groups = _group(places, rows)
    references = {p: _reference(p, places, configuration.get("baseline")) for p in places}
    distances = {task: _distances(task, places, groups) for task in tasks}

    return Summary(
        tuple(
            _row(place, task, groups, references[place], distances[task][place])
            for place in places
            for task in tasks
            if (place, task) in groups
        ),
        tuple(_mean(place, tasks, groups, references[place]) for place in places),
        _run_environment(configuration, environments, [*notes, *_idle_exits(rows)]),
    )


def _idle_exits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which exit policies had no trial answer in any response, one sentence each."""
    trials: dict[tuple[str, str, str], list[bool]] = {}
    for row in rows:
        policy = row.get("policy") or {}
        if policy.get("policy") == "exit":
            place = (row["system"], row["setting"], policy.get("marker", Exit.marker))
            trials.setdefault(place, []).append(row.get("confidence") is not None)
    return [
        f"{setting} of {system} had no trial answer in {len(own)} responses, and changed none: "
        f"no part of their thinking ends with its marker {marker!r}; name another marker."
        for (system, setting, marker), own in trials.items()
        if not any(own)
    ]


def _places(
    configuration: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[_SettingPlace]:
    """List the settings that have samples, in the configuration's order."""
    lambdas = {(row["system"], row["setting"]): row["lambda"] for row in rows}
    return [
        _SettingPlace(*key, setting.get("effort"), lambdas[key])
        for system in configuration["systems"]
        for setting in system["settings"]
        if (key := (system["name"], setting["id"])) in lambdas
    ]


def _group(places: Sequence[_SettingPlace], rows: Sequence[Mapping[str, Any]]) -> _Groups:
    by_name = {(place.system, place.setting): place for place in places}
    members: dict[tuple[_SettingPlace, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        place = by_name[row["system"], row["setting"]]
        members.setdefault((place, row["task"]), []).append(row)
    return {key: Samples.from_rows(own).sorted() for key, own in members.items()}


def _reference(
    place: _SettingPlace, places: Sequence[_SettingPlace], baseline: str | None
) -> _SettingPlace | None:
    """Return the setting whose tokens are a setting's reference; None if there is none."""
    for system in (place.system, baseline):
        members = [p for p in places if p.system == system]
        slow = [p for p in members if p.lam == 0]
        if slow:
            return slow[0]
        if system == baseline and members:
            return members[0]
    return None


def _distances(
    task: str, places: Sequence[_SettingPlace], groups: _Groups
) -> dict[_SettingPlace, Distances | None]:
    """Compute every setting's distances to chord and hull on one task, separately by system.

    A setting has None if no question was answered at all settings of its system.
    """
    found: dict[_SettingPlace, Distances | None] = {}
    for system in dict.fromkeys(place.system for place in places):
        members = [p for p in places if p.system == system and (p, task) in groups]
        if not members:
            continue
        shared = set.intersection(*(set(groups[p, task].questions) for p in members))
        if not shared:
            found |= dict.fromkeys(members)  # None for each
            continue

        slow, fast = (
            next((i for i, p in enumerate(members) if p.lam == lam), None) for lam in (0, 1)
        )
        ends = None if slow is None or fast is None else (slow, fast)
        common = [
            own.on([question for question in own.questions if question in shared])
            for own in (groups[p, task] for p in members)
        ]
        found |= dict(zip(members, distance_intervals(common, ends), strict=True))
    return found


def _row(
    place: _SettingPlace,
    task: str,
    groups: _Groups,
    reference: _SettingPlace | None,
    distances: Distances | None,
) -> SummaryRow:
    samples = groups[place, task]
    base = groups.get((reference, task)) if reference else None
    thinking = samples.thinking_tokens
    return SummaryRow(
        system=place.system,
        setting=place.setting,
        effort=place.effort,
        lam=place.lam,
        task=task,
        n_questions=len(samples.questions),
        n_samples=len(samples),
        accuracy=samples.accuracy_interval(),
        tokens=samples.tokens_interval(),
        thinking_tokens=None if np.isnan(thinking).any() else float(thinking.mean()),
        token_cut=None if base is None else _shared_cut(samples, base),
        chord_distance=distances and distances.chord,
        hull_distance=distances and distances.hull,
        **{status: samples.share(status) for status in _STATUSES},
    )


def _shared_cut(samples: Samples, reference: Samples) -> Interval | None:
    """Return the token cut on the questions that both have; None if there are none."""
    known = set(reference.questions)
    shared = [question for question in samples.questions if question in known]
    base = reference.on(shared)
    if not shared or not base.tokens.any():
        return None
    return samples.on(shared).token_cut(base)


def _mean(
    place: _SettingPlace, tasks: Sequence[str], groups: _Groups, reference: _SettingPlace | None
) -> SummaryMean:
    """Compute the figures over all tasks; a cut needs a reference on every task."""
    own = [groups[place, task] for task in tasks if (place, task) in groups]
    pairs = [
        (groups[place, task].mean_tokens, groups[reference, task].mean_tokens)
        for task in tasks
        if reference and (place, task) in groups and (reference, task) in groups
    ]

    is_complete = len(pairs) == len(own) and all(base > 0 for _, base in pairs)
    tokens, bases = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return SummaryMean(
        place.system,
        place.setting,
        place.effort,
        place.lam,
        float(np.mean([samples.accuracy for samples in own])),
        token_cut_mean(tokens, bases) if is_complete else None,
        token_cut_pooled(tokens, bases) if is_complete else None,
    )


def _run_environment(
    configuration: Mapping[str, Any],
    environments: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    first, *later = environments
    return {
        **({"notes": list(notes)} if notes else {}),
        **first,
        **({"continued_with": later} if later else {}),
        "run": configuration,
    }


# Token cuts from mean tokens.


def token_cut(tokens: float, reference: float) -> float:
    """Return the token cut on one task, from mean tokens.

    Raises:
        DataError: If the reference's tokens are not positive.
    """
    if not reference > 0:
        raise DataError(
            f"a token cut needs a reference that writes something, got {reference} tokens."
        )
    return 1 - tokens / reference


def token_cut_mean(tokens: Sequence[float], references: Sequence[float]) -> float:
    """Return the unweighted mean of the tasks' cuts, as in the paper's Table 1.

    Args:
        tokens: Mean tokens on each task.
        references: The reference's mean tokens on each task, in the same order.

    Raises:
        DataError: If there is no task, or a reference has no tokens.
    """
    _check_pairs(tokens, references)
    return float(np.mean([token_cut(*pair) for pair in zip(tokens, references, strict=True)]))


def token_cut_pooled(tokens: Sequence[float], references: Sequence[float]) -> float:
    """Return the cut of the sum of the tasks' mean tokens; tasks with long responses weigh more.

    Args:
        tokens: Mean tokens on each task.
        references: The reference's mean tokens on each task, in the same order.

    Raises:
        DataError: If there is no task, or the reference has no tokens.
    """
    _check_pairs(tokens, references)
    return token_cut(sum(tokens), sum(references))


def _check_pairs(tokens: Sequence[float], references: Sequence[float]) -> None:
    if not tokens or len(tokens) != len(references):
        raise DataError(
            f"token cuts over tasks need one figure each from both, got {len(tokens)} and "
            f"{len(references)}."
        )


# Several sweeps in one summary.

_Part = TypeVar("_Part", SummaryRow, SummaryMean)


def compare(folders: Sequence[str | Path]) -> Summary:
    """Join the summaries of several sweeps; the folders are not changed.

    Args:
        folders: Results folders of finished runs of `evaluate`, none twice.

    Returns:
        All rows and means as each sweep measured them, with the folder added to each system's
        name. The environment is None, or has only ``notes``: what a reader must know, such as
        that students of one pair were trained differently.

    Raises:
        ConfigError: If a folder is named twice, or has no summary that can be read.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ConfigError("a folder is named twice; name each once.")

    rows: list[SummaryRow] = []
    means: list[SummaryMean] = []
    students: dict[str, Path] = {}
    for path, label in zip(paths, tell_apart(resolved), strict=True):
        summary = _read_summary(path)
        students |= sweep_students(label, summary.environment)
        rows += [_under(label, row) for row in summary.rows]
        means += [_under(label, mean) for mean in summary.means]
    notes = training_notes(students)
    return Summary(tuple(rows), tuple(means), {"notes": notes} if notes else None)


def _under(label: str, part: _Part) -> _Part:
    return replace(part, system=f"{label}/{part.system}")


def _read_summary(folder: Path) -> Summary:
    path = folder / "summary.json"
    try:
        return Summary.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no summary.json; give the --output of flexalign evaluate, and finish "
            "its run first."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}); write it anew with: flexalign evaluate --regrade "
            f"--output {folder}"
        ) from error


# The environment of measurements: versions and machine, but nothing that names a person or a host.


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
