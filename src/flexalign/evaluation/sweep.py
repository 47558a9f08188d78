"""A sweep: systems at several settings answer the same questions, graded and summarised as it goes.

:func:`evaluate` is the whole of it. :func:`plan_sweep` checks what is asked and loads no weights;
the :class:`Sweep` that it returns says what will be sampled and what that costs, and
:meth:`Sweep.run` samples.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flexalign._storage import write_json
from flexalign.data.thinking import ThinkingTags
from flexalign.data.traces import derive_seed
from flexalign.errors import ConfigError
from flexalign.evaluation.grading import Answered, Grader
from flexalign.evaluation.report import write_report
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.summary import Summary, environment, summarise
from flexalign.evaluation.systems import Cell, settings_of
from flexalign.evaluation.tasks import (
    Task,
    TaskSampling,
    load_task,
    sample_warning,
    unreadable_golds,
)
from flexalign.lambdas import Setting, unique_settings
from flexalign.systems import (
    Answer,
    Backend,
    Failure,
    Messages,
    System,
    SystemOptions,
    open_backend,
    parse_systems,
)

Progress = Callable[[int], None]
"""Told how many samples were made since it was last told."""


def evaluate(
    systems: Sequence[str | System],
    tasks: Sequence[str | Task],
    output: str | Path,
    *,
    settings: Sequence[object] = (),
    samples: int | None = None,
    seed: int = 0,
    baseline: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    **options: Any,
) -> "SweepResult":
    """Measure systems at several settings, or go on where an earlier run stopped.

    Args:
        systems: Each as the command line takes it, such as ``dial:BASE,ADAPTER``.
        tasks: Names, paths of files, or tasks of :func:`~flexalign.evaluation.tasks.load_task`.
        output: The results folder; gets the samples, the summary and the report.
        settings: Numbers (λ), policies, schedules or
            :class:`~flexalign.lambdas.Setting`; see ``settings_of`` for the defaults.
        samples: Responses to each question; the tasks' own number if not given.
        seed: Of all sampling.
        baseline: The system against which token cuts of systems without λ = 0 are taken.
        workers: Processes that grade.
        progress: Told of samples as they are made, and first of those that the folder holds.
        **options: Fields of :class:`~flexalign.systems.SystemOptions`; temperature,
            top_p and max_new_tokens are the tasks' own if not given.

    Returns:
        The summary, and the samples that could not be made; the report is written if there are
        none.

    Raises:
        ConfigError: If something is missing, is given twice, or does not go together, or the
            folder belongs to another configuration.
        LambdaError: If a λ is outside an adapter's range.
        ServingError: If a server cannot be used at all.
    """
    sweep = plan_sweep(
        systems, tasks, settings=settings, samples=samples, seed=seed, baseline=baseline, **options
    )
    result = sweep.run(Path(output), workers=workers, begun=progress, progress=progress)
    if not result.lost:
        write_report([Path(output)], Path(output))
    return result


def plan_sweep(
    systems: Sequence[str | System],
    tasks: Sequence[str | Task],
    *,
    settings: Sequence[object] = (),
    samples: int | None = None,
    seed: int = 0,
    baseline: str | None = None,
    **options: Any,
) -> "Sweep":
    """Check what is to be measured; no weights are loaded. Arguments as for :func:`evaluate`."""
    named = parse_systems([system for system in systems if isinstance(system, str)])
    parsed = iter(named)
    asked = [next(parsed) if isinstance(system, str) else system for system in systems]
    loaded = [load_task(task) if isinstance(task, str) else task for task in tasks]

    return Sweep(
        asked,
        loaded,
        unique_settings(settings),
        _agreed(samples, loaded, "samples"),
        seed,
        baseline,
        sampling_options(loaded, **options),
    )


def sampling_options(tasks: Sequence[Task], **options: Any) -> SystemOptions:
    """Make the options of systems, sampled as their tasks are unless something else is asked for.

    Args:
        tasks: Whose temperature, top_p and max_new_tokens hold where they are not given.
        **options: Fields of :class:`~flexalign.systems.SystemOptions`; None is as good
            as not given.

    Raises:
        ConfigError: If the tasks differ in one that is not given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("temperature", "top_p", "max_new_tokens"):
        given[name] = _agreed(given.get(name), tasks, name)
    return SystemOptions(**given)


def _agreed(given: Any, tasks: Sequence[Task], name: str) -> Any:
    """What was asked for, else what the tasks agree on."""
    if given is not None:
        return given
    values = {getattr(task.sampling, name) for task in tasks} or {getattr(TaskSampling(), name)}
    if len(values) > 1:
        option = name.replace("_", "-")
        raise ConfigError(
            f"the tasks differ in their usual {option} ({', '.join(map(str, sorted(values)))}); "
            f"give one for all with --{option}."
        )
    return values.pop()


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    Attributes:
        summary: The contents of ``summary.json``; None if there is no sample at all.
        made: Samples that this run added.
        lost: Samples that could not be made.
    """

    summary: Summary | None
    made: int
    lost: "list[Lost]"


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

        _ = self.backends  # whose making checks that every model is there

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

    def cautions(self) -> list[str]:
        """Name what the summary will not be able to say: one sentence for each."""
        found = []
        alone = [
            system.name
            for system in self.systems
            if all(setting.lam != 0 for setting in self.settings_of(system))
        ]
        if alone and self.baseline is None and len(self.systems) > 1:
            found.append(
                f"{', '.join(alone)}: no λ = 0 there, so that no token cut will be known; name the "
                "system to hold it against with --baseline."
            )
        warnings = (sample_warning(task, self.samples) for task in self.tasks)
        return found + [warning for warning in warnings if warning is not None]

    def unreadable_golds(self, *, workers: int = 1) -> list[dict[str, str]]:
        """List the known answers that no response can match: ``task``, ``question``, ``gold``.

        Args:
            workers: Processes that read them.
        """
        with Grader(workers=workers) as grader:
            return [
                {"task": task.name, "question": question.id, "gold": question.gold}
                for task in self.tasks
                for question in unreadable_golds(task, grader)
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
        before = len(folder.rows)
        if begun is not None:
            begun(before)

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


# Drawing: which samples there are, with which seeds, and how they are made and kept.


class Lost(NamedTuple):
    """A sample that could not be made."""

    system: str
    cell: Cell
    reason: str


def sample_seed(seed: int, task: str, question: str, sample: int) -> int:
    """The seed of one sample: 31 bits from the sweep's seed and the sample's place.

    The setting is left out on purpose: all settings answer with the same luck, so that their
    differences are measured with less noise.
    """
    return derive_seed(seed, task, question, sample)


def sweep_cells(
    tasks: Sequence[Task], settings: Sequence[Setting], samples: int, seed: int = 0
) -> list[Cell]:
    """List a system's samples, by task, question, sample and setting."""
    return [
        Cell(
            setting,
            task.name,
            question.id,
            sample,
            sample_seed(seed, task.name, question.id, sample),
            task.messages(question),
        )
        for task in tasks
        for question in task.questions
        for sample in range(samples)
        for setting in settings
    ]


class Sampler:
    """Draws samples of one system into a results folder, graded."""

    def __init__(
        self, system: str, backend: Backend, folder: ResultsFolder, grader: Grader
    ) -> None:
        """Join a system, a place for its samples and a grader with its thinking tags."""
        self._system, self._backend, self._folder = system, backend, folder
        self._grader, self._golds = grader, folder.golds()
        self._hashes: dict[tuple[str, str], str] = {}

    def draw(self, cells: Sequence[Cell], progress: Progress | None = None) -> list[Lost]:
        """Make what is missing of `cells`; what is made is on the disk before the next batch.

        Returns:
            The samples that could not be made.

        Raises:
            ServingError: If a server cannot be used at all.
        """
        lost: list[Lost] = []
        for outcomes in self._backend.run(cells, self._folder.done(self._system)):
            made = [(cell, given) for cell, given in outcomes if isinstance(given, Answer)]
            self._folder.append(self._rows(made))
            lost += [
                Lost(self._system, cell, given.reason)
                for cell, given in outcomes
                if isinstance(given, Failure)
            ]
            if progress is not None:
                progress(len(made))
        return lost

    def _rows(self, made: list[tuple[Cell, Answer]]) -> list[dict[str, Any]]:
        grades = self._grader.grade_many(
            Answered(answer.text, self._golds[cell.task, cell.question], answer.truncated)
            for cell, answer in made
        )

        return [
            {
                "system": self._system,
                "setting": cell.setting.id,
                "lambda": cell.setting.lam,
                "policy": cell.setting.policy,
                "task": cell.task,
                "question": cell.question,
                "sample": cell.sample,
                "seed": cell.seed,
                "prompt_hash": self._prompt_hash(cell),
                "response": answer.text,
                "tokens": answer.tokens,
                "thinking_tokens": answer.thinking_tokens,
                "rejected_tokens": answer.rejected_tokens,
                "finish": "length" if answer.truncated else "stop",
                "route": answer.route,
                "confidence": answer.confidence,
                "status": grade.status,
                "extracted": grade.extracted,
            }
            for (cell, answer), grade in zip(made, grades, strict=True)
        ]

    def _prompt_hash(self, cell: Cell) -> str:
        place = (cell.task, cell.question)
        if place not in self._hashes:
            text = self._backend.render(cell.messages)
            self._hashes[place] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._hashes[place]


# Stored samples, graded again.


def regrade(output: Path, *, workers: int = 1) -> tuple[Summary, int]:
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


def write_summary(folder: ResultsFolder) -> Summary:
    """Write ``summary.json`` of a results folder, and return what is in it.

    Raises:
        ConfigError: If the folder has no samples.
    """
    summary = summarise(folder.configuration, folder.rows, folder.environments)
    write_json(folder.path / "summary.json", summary.to_json())
    return summary
