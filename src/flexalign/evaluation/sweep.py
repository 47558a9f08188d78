"""A sweep: systems at several settings asked the same questions, graded and summarised as it goes."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flexalign._storage import write_json
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.evaluation.grading import Answered, Grader
from flexalign.evaluation.samples import (
    Lost,
    Progress,
    ResultsFolder,
    Sampler,
    sweep_cells,
)
from flexalign.evaluation.summary import environment, summarise
from flexalign.evaluation.systems import Cell, settings_of
from flexalign.evaluation.tasks import Task
from flexalign.lambdas import Setting
from flexalign.systems import Backend, Messages, System, SystemOptions, open_backend


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    Attributes:
        summary: The contents of ``summary.json``; None if there is no sample at all.
        made: Samples that this run added.
        lost: Samples that could not be made.
    """

    summary: dict[str, Any] | None
    made: int
    lost: list[Lost]


@dataclass(frozen=True)
class Sweep:
    """What is to be measured. Making one finds and checks all models; none is loaded.

    Attributes:
        systems: What is asked.
        tasks: With which questions.
        settings: At which settings, for systems that have a dial; see ``settings_of``.
        samples: Responses a question.
        seed: Of all sampling.
        baseline: The system against which token cuts of systems without λ = 0 are taken.
        options: How systems are run.

    Raises:
        ConfigError: If something is missing, is given twice, or does not go together.
        LambdaError: If a λ is outside an adapter's range.
    """

    systems: Sequence[System]
    tasks: Sequence[Task]
    settings: Sequence[Setting] = ()
    samples: int = 8
    seed: int = 0
    baseline: str | None = None
    options: SystemOptions = field(default_factory=SystemOptions)

    def __post_init__(self) -> None:
        names = [system.name for system in self.systems]
        if not self.systems or not self.tasks:
            raise ConfigError("a sweep needs at least one system and one --task.")
        if self.baseline is not None and self.baseline not in names:
            raise ConfigError(
                f"--baseline {self.baseline!r} is none of the systems: {', '.join(names)}."
            )
        tasks = [task.name for task in self.tasks]
        if len(set(tasks)) < len(tasks):
            raise ConfigError(f"a task is given twice, or two files have one name: {tasks}.")
        _check_options(self.samples, self.options)
        for system in self.systems:
            if not self.settings_of(system):
                raise ConfigError(f"{system.name} takes none of the settings; give it a --lambda.")
        for setting in self.settings:
            if not any(setting in self.settings_of(system) for system in self.systems):
                raise ConfigError(
                    f"no system here can be set to {setting.id}; models have no dial, and weights "
                    "are interpolated at numbers alone."
                )
        _ = self.backends

    def settings_of(self, system: System) -> list[Setting]:
        """The settings that one of the systems is measured at."""
        return settings_of(system, self.settings)

    @cached_property
    def backends(self) -> dict[str, Backend]:
        """The systems, ready to be asked, by name."""
        return {
            system.name: open_backend(system, self.settings_of(system), self.options)
            for system in self.systems
        }

    def cells(self, system: System) -> list[Cell]:
        """All samples of one of the systems."""
        return sweep_cells(self.tasks, self.settings_of(system), self.samples, self.seed)

    @property
    def total(self) -> int:
        """How many samples it is made of."""
        questions = sum(len(task.questions) for task in self.tasks)
        settings = sum(len(self.settings_of(system)) for system in self.systems)
        return questions * self.samples * settings

    def previews(self) -> list[tuple[str, str, str]]:
        """The first prompt of each task as each system is sent it: (system, task, prompt)."""
        return [
            (name, task.name, backend.render(_first(task)))
            for name, backend in self.backends.items()
            for task in self.tasks
        ]

    def configuration(self) -> dict[str, Any]:
        """All that decides the samples, as JSON: hashes, fingerprints, settings and options."""
        options = asdict(self.options)
        kept = ("temperature", "top_p", "max_new_tokens", "gate")
        return {
            "systems": [
                {
                    "name": system.name,
                    **self.backends[system.name].describe(),
                    "settings": [
                        {"id": s.id, "lambda": s.lam, "policy": s.policy, "effort": s.effort}
                        for s in self.settings_of(system)
                    ],
                }
                for system in self.systems
            ],
            "tasks": [
                {"name": t.name, "questions": len(t.questions), "hash": t.content_hash}
                for t in self.tasks
            ],
            "sampling": {
                "samples": self.samples,
                "seed": self.seed,
                **{name: options[name] for name in kept},
            },
            "baseline": self.baseline,
        }

    def run(
        self,
        output: Path,
        *,
        workers: int = 1,
        begun: Callable[[int], None] | None = None,
        progress: Progress | None = None,
    ) -> SweepResult:
        """Sample, grade and summarise, or go on where an earlier run stopped.

        Args:
            output: The results folder.
            workers: Processes that grade.
            begun: Told how many samples the folder already holds.
            progress: Told of samples as they are made.

        Raises:
            ConfigError: If the folder belongs to another configuration.
            ServingError: If a server cannot be used at all.
        """
        configuration = self.configuration()
        folder = ResultsFolder.begin(output, configuration, self.tasks, environment())
        if begun is not None:
            begun(len(folder.rows))
        before = len(folder.rows)
        lost: list[Lost] = []
        with ExitStack() as stack:
            for system, described in zip(self.systems, configuration["systems"], strict=True):
                tags = ThinkingTags(*described["thinking_tags"])
                grader = stack.enter_context(Grader(workers=workers, tags=tags))
                sampler = Sampler(system.name, self.backends[system.name], folder, grader)
                lost += sampler.draw(self.cells(system), progress)
                self.backends[system.name].release()
        summary = write_summary(folder) if folder.rows else None
        return SweepResult(summary, len(folder.rows) - before, lost)


def regrade(output: Path, *, workers: int = 1) -> tuple[dict[str, Any], int]:
    """Grade the stored samples of a results folder again, and summarise them anew.

    Returns:
        The summary, and how many grades have changed.

    Raises:
        ConfigError: If it is no results folder, or has no samples.
    """
    folder = ResultsFolder.read(output)
    golds, changed = folder.golds(), 0
    rows = [dict(row) for row in folder.rows]
    for described in folder.configuration["systems"]:
        own = [row for row in rows if row["system"] == described["name"]]
        with Grader(workers=workers, tags=ThinkingTags(*described["thinking_tags"])) as grader:
            grades = grader.grade_many(
                Answered(
                    row["response"],
                    golds[row["task"], row["question"]],
                    row["finish"] == "length",
                )
                for row in own
            )
        for row, grade in zip(own, grades, strict=True):
            changed += row["status"] != grade.status
            row |= {"status": grade.status, "extracted": grade.extracted}
    folder.replace(rows)
    return write_summary(folder), changed


def write_summary(folder: ResultsFolder) -> dict[str, Any]:
    """Write ``summary.json`` of a results folder, and return what is in it.

    Raises:
        ConfigError: If the folder has no samples.
    """
    summary = summarise(folder.configuration, folder.rows, folder.environments)
    write_json(folder.path / "summary.json", summary)
    return summary


def _first(task: Task) -> Messages:
    return task.messages(task.questions[0])


def _check_options(samples: int, options: SystemOptions) -> None:
    counts = {
        "samples": samples,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "concurrency": options.concurrency,
    }
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(
            f"temperature must be a number ≥ 0 (0 is greedy), got {options.temperature}."
        )
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {options.top_p}.")
    if options.temperature == 0 and samples > 1:
        raise ConfigError(
            f"samples is {samples} at temperature 0, which would write the same response each "
            "time; raise the temperature or take one sample."
        )
    if options.engine not in ("local", "vllm"):
        raise ConfigError(f"the engine is local or vllm, not {options.engine!r}.")
