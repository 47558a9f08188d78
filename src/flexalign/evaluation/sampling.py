"""The samples of a sweep: which there are, with which seeds, and how they are drawn and kept."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flexalign.data.traces import derive_seed
from flexalign.evaluation.grading import Answered, Grader
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.systems import Answer, Backend, Cell, Failure, Setting
from flexalign.evaluation.tasks import Task

__all__ = ["Lost", "Progress", "Sampler", "sample_seed", "sweep_cells"]

Progress = Callable[[int], None]
"""Told how many samples were made since it was last told."""


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
