"""The sources of a tuning's samples: an existing results folder, or a sweep drawn on demand."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, DataError, ServingError
from flexalign.evaluation.grading import Grader
from flexalign.evaluation.samples import ResultsFolder, Samples
from flexalign.evaluation.summary import environment
from flexalign.evaluation.sweep import Progress, Sampler, Sweep, sweep_cells, write_summary

REFERENCE = "λ=0"
"""The id of the setting that candidates are compared with."""

Ask: TypeAlias = Callable[[str, Sequence[str], int], Samples]
"""`ask(setting, questions, samples)`: returns `samples` samples of each question at a setting."""


class Ledger:
    """Asks each question at a setting only once, and counts the samples drawn.

    Args:
        ask: The function that draws samples.
        each: Samples of each question.
    """

    def __init__(self, ask: Ask, each: int) -> None:
        self._ask = ask
        self._each = each
        self._known: dict[str, Samples] = {}
        self.spent: dict[str, int] = {}
        """Number of samples drawn so far, by setting."""

    def samples(self, setting: str, questions: Sequence[str]) -> Samples:
        """Return the samples of these questions in this order; new questions are asked.

        Raises:
            DataError: If the samples of new questions have the wrong number.
        """
        known = self._known.get(setting)
        there = set() if known is None else set(known.questions)
        new = [question for question in questions if question not in there]

        if new:
            drawn = self._ask(setting, new, self._each)
            if drawn.shape != (len(new), self._each) or len(drawn) != len(new) * self._each:
                raise DataError(
                    f"{setting}: asked {len(new)} questions {self._each} times each, got "
                    f"outcomes of shape {drawn.shape}."
                )
            self._known[setting] = known = drawn if known is None else known.joined(drawn)
            self.spent[setting] = self.spent.get(setting, 0) + len(drawn)

        return self._known[setting].on(questions)


class StoredSamples:
    """The samples of one system and task in a results folder.

    Args:
        folder: The results folder.
        system: The system's name; only needed if there are several.
        task: The task's name; only needed if there are several.

    Raises:
        ConfigError: If there are several systems or tasks and none is given, or no samples.
    """

    def __init__(
        self, folder: ResultsFolder, system: str | None = None, task: str | None = None
    ) -> None:
        self._path = folder.path
        self.system = self._only(folder, "system", system)
        """The system's name."""
        self.task = self._only(folder, "task", task)
        """The task's name."""
        self._stored: dict[str, Samples] = {}
        self._add(folder.rows)
        if not self._stored:
            raise ConfigError(f"{folder.path} has no samples of {self.system} on {self.task}.")

    @property
    def settings(self) -> list[str]:
        """Ids of the settings, in the file's order."""
        return list(self._stored)

    @property
    def questions(self) -> list[str]:
        """Questions that have samples at every setting, in the file's order."""
        first, *others = (samples.questions for samples in self._stored.values())
        shared = set(first).intersection(*others)
        return [question for question in first if question in shared]

    @property
    def samples(self) -> int:
        """Largest number of samples that every question has at every setting."""
        questions = self.questions
        return min(samples.on(questions).shape[1] for samples in self._stored.values())

    def ask(self, setting: str, questions: Sequence[str], samples: int) -> Samples:
        """Return the first stored samples of each question; an `Ask`.

        Raises:
            DataError: If a question has too few stored samples.
        """
        stored = self._stored.get(setting, Samples([], [], []))
        counts = dict(zip(stored.questions, stored.counts.tolist(), strict=True))
        for question in questions:
            if counts.get(question, 0) < samples:
                raise DataError(
                    f"{self._path} has {counts.get(question, 0)} samples of question {question} "
                    f"at {setting}, and {samples} are needed; sweep further, or ask for fewer "
                    "--samples."
                )

        # `on` returns each question's samples together, in the order of their numbers.
        places = [place for question in questions for place in range(counts[question])]
        return stored.on(questions).select(np.array(places, dtype=np.intp) < samples)

    def _add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows; each question's samples stay in the order of their numbers."""
        members: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if (row["system"], row["task"]) == (self.system, self.task):
                members.setdefault(row["setting"], []).append(row)
        for setting, own in members.items():
            new = Samples.from_rows(own)
            samples = self._stored[setting].joined(new) if setting in self._stored else new
            self._stored[setting] = samples.select(np.argsort(samples.sample, kind="stable")).on(
                samples.questions
            )

    @staticmethod
    def _only(folder: ResultsFolder, key: str, wanted: str | None) -> str:
        names: list[str] = sorted({row[key] for row in folder.rows})
        if wanted is None and len(names) > 1:
            raise ConfigError(
                f"{folder.path} has more than one {key} ({', '.join(names)}); name one."
            )
        if not names or wanted not in (None, *names):
            raise ConfigError(f"{folder.path} has no samples of {wanted or f'any {key}'}.")
        return wanted or names[0]


class DrawnSamples(StoredSamples):
    """Draws requested samples that are not in the folder yet; a context manager.

    Args:
        sweep: A sweep of one system and one task, with all settings that may be requested.
        output: The results folder; its samples of the same configuration are not drawn again.
        workers: Number of processes that grade.
        progress: Called with the number of samples made since its last call.

    Raises:
        ConfigError: If the folder belongs to another configuration.
    """

    def __init__(
        self,
        sweep: Sweep,
        output: Path,
        *,
        workers: int = 1,
        progress: Progress | None = None,
    ) -> None:
        (system,), (task,) = sweep.systems, sweep.tasks
        self._path = output
        self.system, self.task = system.name, task.name
        self._stored = {}

        self._sweep, self._progress = sweep, progress
        configuration = sweep.configuration()
        self._folder = ResultsFolder.begin(output, configuration, [task], environment())
        self._add(self._folder.rows)

        self._settings = {setting.id: setting for setting in sweep.settings_of(system)}
        self._questions = {question.id: question for question in task.questions}
        self._backend = sweep.backends[system.name]
        self._tags = ThinkingTags(*configuration["systems"][0]["thinking_tags"])
        self._workers = workers
        self._stack = ExitStack()

    def __enter__(self) -> "DrawnSamples":
        """Start the grader."""
        grader = self._stack.enter_context(Grader(workers=self._workers, tags=self._tags))
        self._stack.callback(self._backend.release)
        self._sampler = Sampler(self.system, self._backend, self._folder, grader)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the grader, release the system and write the summary of the samples."""
        self._stack.close()
        if self._folder.rows:
            write_summary(self._folder)

    def ask(self, setting: str, questions: Sequence[str], samples: int) -> Samples:
        """Draw missing samples, and return all of them; an `Ask`.

        Raises:
            ServingError: If samples could not be made; the others are stored.
        """
        (task,) = self._sweep.tasks
        asked = tuple(self._questions[question] for question in questions)
        part = replace(task, questions=asked)
        cells = sweep_cells([part], [self._settings[setting]], samples, self._sweep.seed)

        before = len(self._folder.rows)
        lost = self._sampler.draw(cells, self._progress)
        self._add(self._folder.rows[before:])
        if lost:
            raise ServingError(
                f"{len(lost)} samples at {setting} could not be made (the first: {lost[0].reason}); "
                "give the same command again to go on."
            )
        return super().ask(setting, questions, samples)
