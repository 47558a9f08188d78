"""A sweep: systems answer the same questions at several settings, and are graded and summarised.

:func:`evaluate` does all steps. :func:`plan_sweep` only checks the arguments, and loads no weights;
it returns a :class:`Sweep`, which lists what will be sampled. :meth:`Sweep.run` samples.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flexalign._spelling import nearest
from flexalign._storage import write_json
from flexalign.data.logits import LogitsSettings
from flexalign.data.thinking import ThinkingTags
from flexalign.data.traces import derive_seed
from flexalign.errors import ConfigError, DataError, ServingError
from flexalign.evaluation.grading import Answered, Grader
from flexalign.evaluation.report import write_report
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.students import training_notes
from flexalign.evaluation.summary import Summary, environment, summarise
from flexalign.evaluation.systems import Cell, settings_of
from flexalign.evaluation.tasks import (
    Task,
    TaskSampling,
    load_task,
    sample_warning,
    unreadable_golds,
)
from flexalign.lambdas import Setting, outside_range, unique_settings
from flexalign.models.sources import resolve
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
from flexalign.systems.open import (
    refuse_ladders,
    refuse_unread,
    require_two_models,
    require_two_prompts,
)

_SHOWN = 5
"""The most reasons of lost samples that a message names."""

Progress = Callable[[int], None]
"""A function that is called with the number of samples made since its last call."""


def evaluate(
    systems: Sequence[str | System],
    tasks: Sequence[str | Task],
    output: str | Path,
    *,
    settings: Sequence[object] = (),
    samples: int | None = None,
    seed: int = 0,
    baseline: str | None = None,
    any_training: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    **options: Any,
) -> "SweepResult":
    """Measure systems at several settings, or continue an interrupted run.

    Args:
        systems: Systems in the form of the command line, such as ``dial:BASE,ADAPTER``.
        tasks: Names, paths of files, or tasks of :func:`~flexalign.evaluation.tasks.load_task`.
        output: The results folder for the samples, the summary and the report.
        settings: Numbers (λ), policies, schedules or
            :class:`~flexalign.lambdas.Setting`; see ``settings_of`` for the defaults.
        samples: Responses to each question; the tasks' own number if not given.
        seed: Seed of all sampling.
        baseline: The reference system for the token cuts of systems without λ = 0.
        any_training: Compare students of one pair that were trained differently; the report
            names the differences.
        workers: Number of processes that grade.
        progress: Called first with the number of samples in the folder, and then with the number
            made since its last call.
        **options: Fields of :class:`~flexalign.systems.SystemOptions`, and those of its `logits`,
            such as top_k; temperature, top_p and max_new_tokens are the tasks' own if not given.

    Returns:
        The summary, and the samples that could not be made; the report is only written if there
        are none of these.

    Raises:
        ConfigError: If something is missing or is given twice, arguments contradict each other,
            students of one pair were trained differently, or the folder belongs to another
            configuration.
        LambdaError: If a λ is outside an adapter's range.
        ServingError: If a server cannot be used at all.
    """
    sweep = plan_sweep(
        systems,
        tasks,
        settings=settings,
        samples=samples,
        seed=seed,
        baseline=baseline,
        any_training=any_training,
        **options,
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
    any_training: bool = False,
    **options: Any,
) -> "Sweep":
    """Check a sweep's arguments, which are those of :func:`evaluate`; no weights are loaded."""
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
        any_training,
    )


def sampling_options(tasks: Sequence[Task], **options: Any) -> SystemOptions:
    """Make the options of systems, with the tasks' sampling options as defaults.

    Args:
        tasks: The tasks, for temperature, top_p and max_new_tokens if these are not given.
        **options: Fields of :class:`~flexalign.systems.SystemOptions`, and those of its `logits`,
            such as top_k; None counts as not given.

    Raises:
        ConfigError: If there is no such option, or if one is not given and differs among the tasks.
    """
    logits_names = [one.name for one in fields(LogitsSettings)]
    known = [*(one.name for one in fields(SystemOptions)), *logits_names]
    for name in options:
        if name not in known:
            raise ConfigError(f"systems have no option {name!r}{nearest(name, known)}")

    given = {name: value for name, value in options.items() if value is not None}
    for name in ("temperature", "top_p", "max_new_tokens"):
        given[name] = _agreed(given.get(name), tasks, name)

    logits = {name: given.pop(name) for name in logits_names if name in given}
    if logits:
        given["logits"] = replace(given.get("logits", LogitsSettings()), **logits)
    return SystemOptions(**given)


def _agreed(given: Any, tasks: Sequence[Task], name: str) -> Any:
    """Return the given value, else the value that all tasks have in common."""
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
    """The result of a sweep.

    Attributes:
        summary: The contents of ``summary.json``; None if there is no sample.
        made: Number of samples that this run added.
        lost: Samples that could not be made.
        total: Number of samples that the sweep consists of.
    """

    summary: Summary | None
    made: int
    lost: "list[Lost]"
    total: int

    def require_complete(self) -> Summary:
        """Return the summary of a sweep without lost samples.

        Raises:
            ServingError: If samples could not be made; it says why, each reason once.
        """
        if not self.lost and self.summary is not None:
            return self.summary
        by_reason: dict[str, list[Lost]] = {}
        for one in self.lost:
            by_reason.setdefault(one.reason, []).append(one)
        shown = "; ".join(map(_lost_alike, list(by_reason.values())[:_SHOWN]))
        more = f"; and {len(by_reason) - _SHOWN} more reasons" if len(by_reason) > _SHOWN else ""

        final = sum(one.is_final for one in self.lost)
        again = "give the same command again to ask for these."
        if final:
            again = "what was refused will be refused again."
        if 0 < final < len(self.lost):
            again = f"give the same command again to ask for these; {again}"
        raise ServingError(
            f"{len(self.lost)} of {self.total} samples got no response ({shown}{more}). All others "
            f"are saved; {again}"
        )


@dataclass(frozen=True)
class Sweep:
    """The plan of a sweep. Making one finds and checks all models; none is loaded.

    Attributes:
        systems: The systems that are measured.
        tasks: The tasks with the questions.
        settings: The settings of systems that have a dial; see ``settings_of``.
        samples: Responses to each question.
        seed: Seed of all sampling.
        baseline: The reference system for the token cuts of systems without λ = 0.
        options: Options of the systems.
        any_training: Whether students of one pair may differ in their training; :attr:`notes`
            then says how.

    Raises:
        ConfigError: If something is missing or is given twice, fields contradict each other, or
            students of one pair were trained differently.
        DataError: If a system cannot be asked one of the questions, such as one that is longer than
            its context.
        LambdaError: If a λ is outside an adapter's range.
    """

    systems: Sequence[System]
    tasks: Sequence[Task]
    settings: Sequence[Setting] = ()
    samples: int = 8
    seed: int = 0
    baseline: str | None = None
    options: SystemOptions = field(default_factory=SystemOptions)
    any_training: bool = False

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
        if self.options.prompts is not None and all(one.kind != "prompts" for one in self.systems):
            raise ConfigError(
                "--reference-prompt and --aligned-prompt are about a system prompts:MODEL; name one."
            )
        if self.options.calibration is not None:
            require_two_prompts(self.systems)
        if self.options.by_id:
            require_two_models(self.systems)
        refuse_unread(self.systems, self.options)
        for system in self.systems:
            if not self.settings_of(system):
                refuse_ladders(system, self.settings)
                raise ConfigError(
                    f"{system.name} takes none of the settings; give it a --lambda, or with interpolate: "
                    "a --policy 'ladder 0.9,0.6'."
                )
        for setting in self.settings:
            if not any(setting in self.settings_of(system) for system in self.systems):
                raise ConfigError(
                    f"no system here can be set to {setting.id}; models have no dial, weights are "
                    "interpolated at numbers and under ladders, and ladders are for them alone."
                )

        _ = self.backends  # made here to check that every model exists
        self._require_prompts()
        if self.notes and not self.any_training:
            raise ConfigError(
                f"{' '.join(self.notes).removesuffix('.')}; so λ is not all that sets them apart: "
                "train them alike, or compare them with --any-training (any_training=True), which "
                "says so in the report."
            )

    def _require_prompts(self) -> None:
        """Render every question for every system, so that one is refused before anything is written."""
        for system in self.systems:
            for task in self.tasks:
                for number, question in enumerate(task.questions, start=1):
                    asked = _asked(system, task.messages(question), number)
                    try:
                        self.backends[system.name].render(asked)
                    except DataError as error:
                        raise DataError(
                            f"{system.name}, question {question.id} of {task.name}: {error}"
                        ) from error

    def settings_of(self, system: System) -> list[Setting]:
        """Return the settings at which one of the systems is measured."""
        return settings_of(system, self.settings)

    @cached_property
    def backends(self) -> dict[str, Backend]:
        """The opened systems, by name."""
        return {
            system.name: open_backend(system, self.settings_of(system), self._options_of(system))
            for system in self.systems
        }

    @cached_property
    def notes(self) -> list[str]:
        """What a reader of the results must know of the systems, one sentence each."""
        models = [system for system in self.systems if system.kind == "model"]
        return training_notes({one.name: resolve(one.parts[0]).path for one in models})

    def _options_of(self, system: System) -> SystemOptions:
        """Return the options of one system; some are about two models or two prompts alone."""
        return replace(
            self.options,
            by_id=self.options.by_id and system.has_two_models,
            calibration=self.options.calibration if system.kind == "prompts" else None,
        )

    def cells(self, system: System) -> list[Cell]:
        """List all samples of one of the systems."""
        cells = sweep_cells(self.tasks, self.settings_of(system), self.samples, self.seed)
        if system.prompt.system is None:
            return cells
        return [
            replace(cell, messages=_asked(system, cell.messages, number))
            for number, cell in enumerate(cells, start=1)
        ]

    @property
    def total(self) -> int:
        """Number of samples of all systems, settings and tasks."""
        questions = sum(len(task.questions) for task in self.tasks)
        settings = sum(len(self.settings_of(system)) for system in self.systems)
        return questions * self.samples * settings

    def previews(self) -> list[tuple[str, str, str]]:
        """Render the first prompt of each task for each system: (system, task, prompt)."""
        return [
            (
                system.name,
                task.name,
                self.backends[system.name].render(_asked(system, _first(task))),
            )
            for system in self.systems
            for task in self.tasks
        ]

    def cautions(self) -> list[str]:
        """Return warnings about the summary, one sentence each."""
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
        dials = [setting.dial for one in self.systems for setting in self.settings_of(one)]
        if self.options.gate is not None and all(
            dial is None or outside_range(dial, (0, 1)) is None for dial in dials
        ):
            found.append(
                "--gate has no effect: it is about λ outside [0, 1], and none is measured."
            )
        if self.baseline is not None and not alone:
            found.append(
                f"--baseline {self.baseline} has no effect: every system has λ = 0, which its token "
                "cuts are held against."
            )
        warnings = (sample_warning(task, self.samples) for task in self.tasks)
        return [*found, *self.notes] + [warning for warning in warnings if warning is not None]

    def unreadable_golds(self, *, workers: int = 1) -> list[dict[str, str]]:
        """List the known answers that no response can match, by ``task``, ``question``, ``gold``.

        Args:
            workers: Number of processes that parse them.
        """
        with Grader(workers=workers) as grader:
            return [
                {"task": task.name, "question": question.id, "gold": question.gold}
                for task in self.tasks
                for question in unreadable_golds(task, grader)
            ]

    def configuration(self) -> dict[str, Any]:
        """Return everything that determines the samples, as JSON.

        It includes hashes, fingerprints, settings and options.
        """
        options = asdict(self.options)
        kept = ("temperature", "top_p", "max_new_tokens", "gate")

        return {
            "systems": [
                {
                    "name": system.name,
                    **self.backends[system.name].describe(),
                    **({"own": system.own} if system.own else {}),
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
                **self.options.logits.to_json(),
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
        """Sample, grade and summarise, or continue an interrupted run.

        Args:
            output: The results folder.
            workers: Number of processes that grade.
            begun: Called once with the number of samples that the folder already holds.
            progress: Called with the number of samples made since its last call.

        Raises:
            ConfigError: If the folder belongs to another configuration.
            ServingError: If a server cannot be used at all.
        """
        configuration = self.configuration()
        folder = ResultsFolder.begin(
            output, configuration, self.tasks, environment(), notes=self.notes
        )
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
        return SweepResult(summary, len(folder.rows) - before, lost, self.total)


def _first(task: Task) -> Messages:
    return task.messages(task.questions[0])


def _asked(system: System, messages: Messages, number: int = 1) -> Messages:
    """Return a question as one of the systems is asked it: with the system message of its own."""
    asked: Messages = system.prompt.with_system({"prompt": messages}, number)
    return asked


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


# Sampling: the list of samples with their seeds, and how they are drawn and stored.


class Lost(NamedTuple):
    """A sample that could not be made."""

    system: str
    cell: Cell
    reason: str
    is_final: bool = False
    """Whether the same request would fail again."""


def _lost_alike(lost: Sequence[Lost]) -> str:
    """Name the first of the samples that were lost for one reason, their number, and the reason."""
    first = lost[0]
    place = f"question {first.cell.question} of {first.cell.task} at {first.cell.setting.label}"
    others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"{place}, {first.system}{others}: {first.reason.removesuffix('.')}"


def sample_seed(seed: int, task: str, question: str, sample: int) -> int:
    """Return the seed of one sample: 31 bits, derived from the arguments.

    It does not depend on the setting: all settings sample with common random numbers, which
    reduces the noise of their differences.
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
    """Draws the samples of one system, grades them and stores them in a results folder."""

    def __init__(
        self, system: str, backend: Backend, folder: ResultsFolder, grader: Grader
    ) -> None:
        """Make a sampler.

        Args:
            system: The system's name.
            backend: The opened system.
            folder: The results folder.
            grader: A grader with the system's thinking tags.
        """
        self._system, self._backend, self._folder = system, backend, folder
        self._grader, self._golds = grader, folder.golds()
        self._hashes: dict[tuple[str, str], str] = {}

    def draw(self, cells: Sequence[Cell], progress: Progress | None = None) -> list[Lost]:
        """Draw those of `cells` that are missing; each batch is on the disk before the next one.

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
                Lost(self._system, cell, given.reason, given.is_final)
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


# Grading stored samples again.


def regrade(output: Path, *, workers: int = 1) -> tuple[Summary, int]:
    """Grade the stored samples of a results folder again, and write a new summary.

    Returns:
        The summary, and the number of grades that changed.

    Raises:
        ConfigError: If it is not a results folder, or has no samples.
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
    """Write ``summary.json`` of a results folder, and return its contents.

    Raises:
        ConfigError: If the folder has no samples.
    """
    summary = summarise(folder.configuration, folder.rows, folder.environments, folder.notes)
    write_json(folder.path / "summary.json", summary.to_json())
    return summary
