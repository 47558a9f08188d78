"""A results folder: its configuration, its questions, and samples that are written as they come.

``run.json`` is written first and says what the samples are; a sweep that goes on must agree with
it. ``samples.jsonl`` grows by whole batches. Both are plain files that other tools may read.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flexalign._differences import differences
from flexalign._storage import write_json, write_text
from flexalign.data.traces import derive_seed, drop_half_line
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.grading import Answered, Grader
from flexalign.evaluation.systems import Cell, Key
from flexalign.evaluation.tasks import Task
from flexalign.lambdas import Setting
from flexalign.systems import Answer, Backend, Failure

FORMAT_VERSION = 1


class ResultsFolder:
    """The files of one sweep.

    Attributes:
        path: The folder.
        rows: The samples that it holds, in the file's order.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """Use :meth:`begin` or :meth:`read`."""
        self.path = path
        self._run = run
        self.rows: list[dict[str, Any]] = []

    @classmethod
    def begin(
        cls,
        path: Path,
        configuration: Mapping[str, Any],
        tasks: Sequence[Task],
        environment: Mapping[str, Any],
    ) -> "ResultsFolder":
        """Start a results folder, or go on with one of the same configuration.

        Args:
            path: The folder; made if it is not there.
            configuration: All that decides the samples, as JSON.
            tasks: Whose questions are written down.
            environment: Versions and machine. One that differs from the first is added to it.

        Raises:
            ConfigError: If the folder belongs to another configuration; names what differs.
            DataError: If its samples are damaged.
        """
        expected = json.loads(json.dumps(configuration))
        file = path / "run.json"
        if file.exists():
            folder = cls.read(path)
            form = "{key}: {before} there, {now} asked"
            different = list(differences(folder.configuration, expected, form=form))
            if different:
                raise ConfigError(
                    f"{path} holds results of another configuration ({'; '.join(different)}); "
                    "repeat that one's options to go on with it, or name another --output."
                )
            if environment not in folder.environments:
                folder._run["environments"].append(dict(environment))
                write_json(file, folder._run)
            return folder
        if (path / "samples.jsonl").exists():
            raise ConfigError(
                f"{path} has samples and no run.json that says what they are; move them away or "
                "name another --output."
            )
        path.mkdir(parents=True, exist_ok=True)
        questions = [
            {"task": task.name, "question": q.id, "problem": q.problem, "gold": q.gold}
            for task in tasks
            for q in task.questions
        ]
        _write_rows(path / "questions.jsonl", questions)
        run = {
            "format_version": FORMAT_VERSION,
            "configuration": expected,
            "environments": [dict(environment)],
        }
        write_json(file, run)
        return cls(path, run)

    @classmethod
    def read(cls, path: Path) -> "ResultsFolder":
        """Open a results folder that is there; a half-written last line is cut off.

        Raises:
            ConfigError: If it is none, or of a later format.
            DataError: If its samples are damaged.
        """
        file = path / "run.json"
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            version = run["format_version"]
        except FileNotFoundError:
            raise ConfigError(
                f"{path} is no results folder (run.json is missing); give the --output of "
                "flexalign evaluate."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged ({error}); move the folder away and sample again."
            ) from error
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{file} has format_version {version!r} and this flexalign reads "
                f"{FORMAT_VERSION}; use the flexalign that wrote it."
            )
        folder = cls(path, run)
        drop_half_line(folder.samples_file)
        folder.rows = list(folder._stored())
        return folder

    @property
    def samples_file(self) -> Path:
        """``samples.jsonl``."""
        return self.path / "samples.jsonl"

    @property
    def configuration(self) -> dict[str, Any]:
        """What decides the samples."""
        return dict(self._run["configuration"])

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Versions and machines that made them, the first one first."""
        return list(self._run["environments"])

    def golds(self) -> dict[tuple[str, str], str]:
        """The known answers by (task, question)."""
        file = self.path / "questions.jsonl"
        with file.open(encoding="utf-8") as lines:
            rows = map(json.loads, lines)
            return {(row["task"], row["question"]): row["gold"] for row in rows}

    def done(self, system: str) -> set[Key]:
        """The samples of one system that are there."""
        return {
            Key(row["setting"], row["task"], row["question"], row["sample"])
            for row in self.rows
            if row["system"] == system
        }

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write samples, and do not return before they are on the disk."""
        with self.samples_file.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def replace(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write all samples anew, at once."""
        _write_rows(self.samples_file, rows)
        self.rows = list(rows)

    def _stored(self) -> Iterator[dict[str, Any]]:
        if not self.samples_file.exists():
            return
        with self.samples_file.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict) or not row.keys() >= _IDENTITY:
                    raise DataError(
                        f"{self.samples_file}: line {number} is no sample; remove that line and "
                        "run again."
                    )
                yield row


_IDENTITY = {"system", "setting", "task", "question", "sample", "status", "tokens"}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(map(_line, rows)))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


# The samples of a sweep: which there are, with which seeds, and how they are drawn and kept.

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


# What came of asking: right or wrong and how long, by question and sample.


@dataclass(frozen=True)
class Outcomes:
    """Answers of one setting to n questions, k samples each.

    Attributes:
        correct: Whether each is right, shape (n, k), bool.
        tokens: Length of each, shape (n, k).

    Raises:
        DataError: If the two differ in shape, or are not (n, k).
    """

    correct: NDArray[np.bool_]
    tokens: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.correct.ndim != 2 or self.correct.shape != self.tokens.shape:
            raise DataError(
                "outcomes need `correct` and `tokens` of one shape (questions, samples), got "
                f"{self.correct.shape} and {self.tokens.shape}."
            )

    @property
    def questions(self) -> int:
        """How many questions were asked."""
        return len(self.correct)

    @property
    def samples(self) -> int:
        """How many answers there are in all."""
        return int(self.correct.size)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.mean())

    @property
    def mean_tokens(self) -> float:
        """Mean tokens an answer."""
        return float(self.tokens.mean())

    @property
    def clusters(self) -> list[int]:
        """The question of each sample, for intervals over the flattened values."""
        n, k = self.correct.shape
        return np.repeat(np.arange(n), k).tolist()

    def rows(self, places: Sequence[int]) -> "Outcomes":
        """The outcomes at these places, in this order."""
        return Outcomes(self.correct[places], self.tokens[places])

    def joined(self, other: "Outcomes") -> "Outcomes":
        """These outcomes and then another's, of as many samples."""
        return Outcomes(
            np.concatenate([self.correct, other.correct]),
            np.concatenate([self.tokens, other.tokens]),
        )

    def share_right(self) -> NDArray[np.float64]:
        """Share of right answers a question, shape (n,)."""
        return np.asarray(self.correct.mean(1), dtype=np.float64)


Ask: TypeAlias = Callable[[str, Sequence[str], int], Outcomes]
"""`ask(setting, questions, samples)`: put each question `samples` times, in this order."""


class Ledger:
    """Asks each question of a setting once, and counts what that took.

    Args:
        ask: How samples are drawn.
        samples: Samples a question.
    """

    def __init__(self, ask: Ask, samples: int) -> None:
        self._ask = ask
        self._samples = samples
        self._places: dict[str, dict[str, int]] = {}
        self._known: dict[str, Outcomes] = {}
        self.spent: dict[str, int] = {}
        """Samples drawn so far, by setting."""

    def outcomes(self, setting: str, questions: Sequence[str]) -> Outcomes:
        """Return the answers to these questions, asking those that are new.

        Raises:
            DataError: If what was asked came back in another shape.
        """
        places = self._places.setdefault(setting, {})
        new = [question for question in questions if question not in places]
        if new:
            answers = self._ask(setting, new, self._samples)
            if answers.correct.shape != (len(new), self._samples):
                raise DataError(
                    f"{setting}: asked {len(new)} questions {self._samples} times each, got "
                    f"outcomes of shape {answers.correct.shape}."
                )
            places.update(zip(new, range(len(places), len(places) + len(new)), strict=True))
            known = self._known.get(setting)
            self._known[setting] = answers if known is None else known.joined(answers)
            self.spent[setting] = self.spent.get(setting, 0) + answers.samples
        return self._known[setting].rows([places[question] for question in questions])
