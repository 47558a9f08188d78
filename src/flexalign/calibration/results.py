"""Answers in a results folder: those that an earlier sweep has left, or those drawn as asked."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, DataError, ServingError
from flexalign.evaluation.grading import Grader
from flexalign.evaluation.samples import Outcomes, ResultsFolder, Sampler, sweep_cells
from flexalign.evaluation.summary import environment
from flexalign.evaluation.sweep import Sweep, write_summary


class StoredAnswers:
    """The samples of one system and task in a results folder, as outcomes.

    Args:
        folder: The results folder.
        system: The system's name; may be left out if there is one.
        task: The task's name; likewise.

    Raises:
        ConfigError: If there are several systems or tasks and none is named, or no samples.
    """

    def __init__(
        self, folder: ResultsFolder, system: str | None = None, task: str | None = None
    ) -> None:
        self._path = folder.path
        self.system = self._only(folder, "system", system)
        """Whose samples these are."""
        self.task = self._only(folder, "task", task)
        """On which task."""
        self._answers: dict[str, dict[str, dict[int, tuple[bool, float]]]] = {}
        self._add(folder.rows)
        if not self._answers:
            raise ConfigError(f"{folder.path} has no samples of {self.system} on {self.task}.")

    @property
    def settings(self) -> list[str]:
        """Ids of the settings, in the file's order."""
        return list(self._answers)

    @property
    def questions(self) -> list[str]:
        """Questions that every setting has answered, in the file's order."""
        first, *others = self._answers.values()
        return [question for question in first if all(question in other for other in others)]

    @property
    def samples(self) -> int:
        """Samples that every setting has of each of these questions."""
        return min(
            (
                len(of_setting[question])
                for of_setting in self._answers.values()
                for question in self.questions
            ),
            default=0,
        )

    def ask(self, setting: str, questions: Sequence[str], samples: int) -> Outcomes:
        """Return stored answers; the engine's `Ask`.

        Raises:
            DataError: If they are not there.
        """
        answers = []
        for question in questions:
            stored = self._answers.get(setting, {}).get(question, {})
            if len(stored) < samples:
                raise DataError(
                    f"{self._path} has {len(stored)} samples of question {question} at {setting}, "
                    f"and {samples} are needed; sweep further, or ask for fewer --samples."
                )
            answers.append([stored[number] for number in sorted(stored)[:samples]])
        table = np.array(answers, dtype=np.float64)
        return Outcomes(table[..., 0] > 0, table[..., 1])

    def _add(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            if (row["system"], row["task"]) == (self.system, self.task):
                of_setting = self._answers.setdefault(row["setting"], {})
                answer = (row["status"] == "correct", float(row["tokens"]))
                of_setting.setdefault(row["question"], {})[row["sample"]] = answer

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


class DrawnAnswers(StoredAnswers):
    """Draws what is asked and is not in the folder yet; a context manager.

    Args:
        sweep: One system and one task, with all settings that may be asked.
        output: The results folder; what it holds of the same configuration is not drawn again.
        workers: Processes that grade.
        progress: Told how many samples were made since it was last told.

    Raises:
        ConfigError: If the folder belongs to another configuration.
    """

    def __init__(
        self,
        sweep: Sweep,
        output: Path,
        *,
        workers: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        (system,), (task,) = sweep.systems, sweep.tasks
        self._path = output
        self.system, self.task = system.name, task.name
        self._answers = {}
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

    def __enter__(self) -> "DrawnAnswers":
        """Start the grader."""
        grader = self._stack.enter_context(Grader(workers=self._workers, tags=self._tags))
        self._stack.callback(self._backend.release)
        self._sampler = Sampler(self.system, self._backend, self._folder, grader)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the grader, let the system go and sum up what there is."""
        self._stack.close()
        if self._folder.rows:
            write_summary(self._folder)

    def ask(self, setting: str, questions: Sequence[str], samples: int) -> Outcomes:
        """Draw what is missing, and return the answers.

        Raises:
            ServingError: If samples could not be made; those that could are kept.
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
