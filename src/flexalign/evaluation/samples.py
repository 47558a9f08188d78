"""Samples: the table from which all figures are computed, and the folder that stores it.

A sweep writes a results folder. ``run.json`` is written first and describes the samples;
``samples.jsonl`` grows by whole batches. Both are plain files that other tools may read.
:class:`Samples` holds the samples of one setting on one task as columns; summaries, reports,
calibration and tuning use it.
"""

import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexalign._differences import differences
from flexalign._storage import write_json, write_text
from flexalign.data.traces import drop_half_line
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.systems import Key
from flexalign.evaluation.tasks import Task
from flexalign.statistics import (
    Interval,
    clustered_interval,
    paired_difference_interval,
    token_cut_interval,
)

FORMAT_VERSION = 1

_COLUMNS = (
    "question",
    "sample",
    "correct",
    "status",
    "tokens",
    "thinking_tokens",
    "rejected_tokens",
    "confidence",
    "route",
)
_IDENTITY = {"system", "setting", "task", "question", "sample", "status", "tokens"}
"""The keys that every line of ``samples.jsonl`` must have."""


class Samples:
    """Graded responses of one setting to the questions of one task, one column for each figure.

    All columns have shape (n,), n the number of samples.

    Attributes:
        question: The question of each sample.
        sample: Its number among the samples of its question, from 0.
        correct: Whether the answer is right, bool.
        status: The grade: correct, wrong, unparsed, truncated or no_answer.
        tokens: Number of tokens, including rejected ones, float.
        thinking_tokens: Number of tokens between the thinking tags, float; NaN if not known.
        rejected_tokens: Number of tokens of an answer that a policy did not accept, float.
        confidence: A policy's confidence in the fast answer, float; NaN without a policy.
        route: The stream that a policy chose, ``fast`` or ``slow``; None without a policy.

    Raises:
        DataError: If the columns differ in length.
    """

    def __init__(
        self,
        question: Iterable[Hashable],
        correct: ArrayLike,
        tokens: ArrayLike,
        *,
        sample: ArrayLike | None = None,
        status: Iterable[str] | None = None,
        thinking_tokens: ArrayLike | None = None,
        rejected_tokens: ArrayLike | None = None,
        confidence: ArrayLike | None = None,
        route: Iterable[str | None] | None = None,
    ) -> None:
        self.question = _objects(question)
        self.correct = np.asarray(correct, dtype=np.bool_)
        self.tokens = np.asarray(tokens, dtype=np.float64)

        count = self.question.size
        unknown = np.full(count, np.nan)
        self.sample = np.asarray(np.zeros(count) if sample is None else sample, dtype=np.int64)
        self.status = (
            np.where(self.correct, "correct", "wrong").astype(object)
            if status is None
            else _objects(status)
        )
        self.thinking_tokens = _floats(unknown if thinking_tokens is None else thinking_tokens)
        self.rejected_tokens = _floats(
            np.zeros(count) if rejected_tokens is None else rejected_tokens
        )
        self.confidence = _floats(unknown if confidence is None else confidence)
        self.route = _objects([None] * count if route is None else route)

        shapes = {name: getattr(self, name).shape for name in _COLUMNS}
        if set(shapes.values()) != {(count,)}:
            raise DataError(f"samples need one value of each kind for each sample, got {shapes}.")

    def __len__(self) -> int:
        """The number of samples."""
        return int(self.question.size)

    # Conversion from and to rows.

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> "Samples":
        """Make samples of lines of ``samples.jsonl``, in the same order.

        Args:
            rows: Mappings with question, sample, status and tokens; other columns may be missing.
        """
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for row in rows:
            columns["question"].append(row["question"])
            columns["sample"].append(row["sample"])
            columns["status"].append(row["status"])
            columns["correct"].append(row["status"] == "correct")
            columns["tokens"].append(row["tokens"] or 0)
            columns["rejected_tokens"].append(row.get("rejected_tokens") or 0)
            for name in ("thinking_tokens", "confidence", "route"):
                columns[name].append(row.get(name))
        return cls(**columns)

    @classmethod
    def from_table(
        cls, correct: ArrayLike, tokens: ArrayLike, questions: Sequence[Hashable] | None = None
    ) -> "Samples":
        """Make samples of tables: k samples of each of n questions.

        Args:
            correct: Whether each sample is right, shape (n, k).
            tokens: The number of tokens of each sample, shape (n, k).
            questions: The n questions; if not given, 0 to n − 1.

        Raises:
            DataError: If the two tables differ in shape, or do not have two dimensions.
        """
        right, lengths = np.asarray(correct), np.asarray(tokens)
        if right.ndim != 2 or right.shape != lengths.shape:
            raise DataError(
                "samples need `correct` and `tokens` of one shape (questions, samples), got "
                f"{right.shape} and {lengths.shape}."
            )
        count, each = right.shape
        names = list(range(count) if questions is None else questions)
        made = cls(
            np.repeat(_objects(names), each),
            right.ravel(),
            lengths.ravel(),
            sample=np.tile(np.arange(each), count),
        )
        if each and len(set(names)) == count:
            made._grouping = names, np.repeat(np.arange(count), each)
        return made

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one mapping for each sample, with the columns as keys; NaN becomes None."""
        values = {name: getattr(self, name).tolist() for name in _COLUMNS}
        for name in ("thinking_tokens", "confidence"):
            values[name] = [None if np.isnan(value) else value for value in values[name]]
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]

    # Selection.

    def select(self, where: ArrayLike) -> "Samples":
        """Return the samples at the given indices, or where a mask is true."""
        chosen = np.asarray(where)
        return Samples(**{name: getattr(self, name)[chosen] for name in _COLUMNS})

    def sorted(self) -> "Samples":
        """Return the samples sorted by question and sample number."""
        question, sample = self.question.tolist(), self.sample.tolist()
        return self.select(sorted(range(len(self)), key=lambda i: (question[i], sample[i])))

    def on(self, questions: Sequence[Hashable]) -> "Samples":
        """Return the samples of these questions, question by question in the given order.

        Raises:
            DataError: If one of them has no sample.
        """
        places = {name: place for place, name in enumerate(self.questions)}
        missing = [name for name in questions if name not in places]
        if missing:
            raise DataError(f"there is no sample of question {missing[0]!r}.")

        # In `order`, the samples of a question are one run; the wanted runs are put in a row.
        order = np.argsort(self._grouping[1], kind="stable")
        wanted = np.array([places[name] for name in questions], dtype=np.intp)
        counts = self.counts
        sizes = counts[wanted]
        first = (np.cumsum(counts) - counts)[wanted]
        ends = np.cumsum(sizes)
        within = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)

        chosen = self.select(order[np.repeat(first, sizes) + within])
        chosen._grouping = list(questions), np.repeat(np.arange(len(wanted)), sizes)
        return chosen

    def joined(self, other: "Samples") -> "Samples":
        """Return these samples, followed by the other ones."""
        joined = Samples(
            **{
                name: np.concatenate([getattr(self, name), getattr(other, name)])
                for name in _COLUMNS
            }
        )
        (own, index), (more, others) = self._grouping, other._grouping
        places = {name: place for place, name in enumerate(dict.fromkeys([*own, *more]))}
        moved = np.array([places[name] for name in more], dtype=np.intp)
        joined._grouping = list(places), np.concatenate([index, moved[others]])
        return joined

    # Figures by question.

    @property
    def questions(self) -> list[Any]:
        """The questions, in the order of their first samples."""
        return list(self._grouping[0])

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of samples of each question, in the order of :attr:`questions`."""
        names, index = self._grouping
        return np.bincount(index, minlength=len(names)).astype(np.int64)

    def by_question(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the mean of a column for each question, in the order of :attr:`questions`.

        Args:
            values: One value for each sample, such as ``samples.tokens``, shape (n,).
        """
        names, index = self._grouping
        sums = np.bincount(index, np.asarray(values, dtype=np.float64), len(names))
        return np.asarray(sums / self.counts, dtype=np.float64)

    def table(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a column with one row for each question, shape (questions, samples of each).

        Raises:
            DataError: If the questions have different numbers of samples.
        """
        counts = self.counts
        if np.unique(counts).size > 1:
            raise DataError("the questions have different numbers of samples; no table holds them.")
        order = np.argsort(self._grouping[1], kind="stable")
        return values[order].reshape(counts.size, -1)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of questions, and the least number of samples of any question."""
        return len(self._grouping[0]), int(self.counts.min(initial=len(self)))

    @cached_property
    def _grouping(self) -> tuple[list[Any], NDArray[np.intp]]:
        """The questions, and for each sample the index of its question, shape (n,).

        It takes a step for each sample, so methods that know it of the samples they make set it:
        a tuning makes many.
        """
        places: dict[Hashable, int] = {}
        index = np.fromiter(
            (places.setdefault(question, len(places)) for question in self.question),
            np.intp,
            len(self),
        )
        return list(places), index

    # Figures.

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.mean())

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a response."""
        return float(self.tokens.mean())

    def share(self, status: str) -> float:
        """Return the share of the samples that have the grade `status`."""
        return float((self.status == status).mean())

    def accuracy_interval(self, confidence: float = 0.95) -> Interval:
        """Return the accuracy with its interval, clustered by question."""
        return clustered_interval(self.correct, self.question.tolist(), confidence, share=True)

    def tokens_interval(self, confidence: float = 0.95) -> Interval:
        """Return the mean tokens with their interval, clustered by question."""
        return clustered_interval(self.tokens, self.question.tolist(), confidence, share=False)

    def accuracy_difference(self, reference: "Samples", confidence: float = 0.95) -> Interval:
        """Return the accuracy minus that of a reference, paired by question.

        Raises:
            DataError: If the two do not have the same questions.
        """
        return paired_difference_interval(
            self.correct,
            self.question.tolist(),
            reference.correct,
            reference.question.tolist(),
            confidence,
        )

    def token_cut(self, reference: "Samples", confidence: float = 0.95) -> Interval:
        """Return the share of a reference's tokens that is saved, paired by question.

        Raises:
            DataError: If the two do not have the same questions, or the reference has no tokens.
        """
        return token_cut_interval(
            self.tokens,
            self.question.tolist(),
            reference.tokens,
            reference.question.tolist(),
            confidence,
        )


def _objects(values: Iterable[Any]) -> NDArray[np.object_]:
    """Return an array of Python values.

    ``np.asarray`` would turn tuples into rows of a table, and texts into a fixed-width type.
    """
    if isinstance(values, np.ndarray):
        values = values.tolist() if values.dtype != object else values
    if isinstance(values, np.ndarray):
        return values
    given = list(values)
    return np.fromiter(given, dtype=object, count=len(given))


def _floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


class ResultsFolder:
    """The files of one sweep.

    Attributes:
        path: The folder.
        rows: Its samples, in the file's order.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """Do not call; :meth:`begin` and :meth:`read` make instances."""
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
        *,
        notes: Sequence[str] = (),
    ) -> "ResultsFolder":
        """Start a results folder, or continue one of the same configuration.

        A folder without a sample, as a run leaves it that failed before its first one, is started
        anew with any configuration.

        Args:
            path: The folder; created if it does not exist.
            configuration: Everything that determines the samples, as JSON.
            tasks: The tasks, whose questions are written to ``questions.jsonl``.
            environment: Versions and machine; added to the folder's environments if it is new.
            notes: What a reader of the results must know, which decides no sample.

        Raises:
            ConfigError: If the folder has samples of another configuration; the message names the
                differences.
            DataError: If its samples are damaged.
        """
        # In the types that JSON has, as the stored configuration is.
        expected = json.loads(json.dumps(configuration))
        file = path / "run.json"

        if file.exists():
            folder = cls.read(path)
            form = "{key}: {before} there, {now} asked"
            different = list(differences(folder.configuration, expected, form=form))
            if different and folder.rows:
                raise ConfigError(
                    f"{path} holds results of another configuration ({'; '.join(different)}); "
                    "repeat that one's options to go on with it, or name another --output."
                )
            if not different:
                if environment not in folder.environments or list(notes) != folder.notes:
                    if environment not in folder.environments:
                        folder._run["environments"].append(dict(environment))
                    folder._run |= {"notes": list(notes)} if notes or folder.notes else {}
                    write_json(file, folder._run)
                return folder

        elif (path / "samples.jsonl").exists():
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

        # Written last: a folder with run.json counts as complete.
        run = {
            "format_version": FORMAT_VERSION,
            "configuration": expected,
            "environments": [dict(environment)],
            **({"notes": list(notes)} if notes else {}),
        }
        write_json(file, run)
        return cls(path, run)

    @classmethod
    def read(cls, path: Path) -> "ResultsFolder":
        """Open an existing results folder; a half-written last line is removed.

        Raises:
            ConfigError: If it is not a results folder, or has another format version.
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
        """The path of ``samples.jsonl``."""
        return self.path / "samples.jsonl"

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything that determines the samples, as JSON."""
        return dict(self._run["configuration"])

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Versions and machines that made them, the first one first."""
        return list(self._run["environments"])

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know, one sentence each."""
        return list(self._run.get("notes", ()))

    def golds(self) -> dict[tuple[str, str], str]:
        """Read the known answers, by (task, question)."""
        file = self.path / "questions.jsonl"
        with file.open(encoding="utf-8") as lines:
            rows = map(json.loads, lines)
            return {(row["task"], row["question"]): row["gold"] for row in rows}

    def done(self, system: str) -> set[Key]:
        """Return the keys of one system's stored samples."""
        return {
            Key(row["setting"], row["task"], row["question"], row["sample"])
            for row in self.rows
            if row["system"] == system
        }

    def samples(self, system: str, setting: str, task: str) -> Samples:
        """Return the samples of one setting on one task, in the file's order."""
        place = (system, setting, task)
        return Samples.from_rows(
            row for row in self.rows if (row["system"], row["setting"], row["task"]) == place
        )

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append samples to the file; returns only after they are on the disk.

        Raises:
            ConfigError: If the folder had no sample, and another configuration has taken it over.
        """
        if rows and not self.rows:
            differing = differences(ResultsFolder.read(self.path).configuration, self.configuration)
            if list(differing):
                raise ConfigError(
                    f"{self.path} was taken over by a run of another configuration while this one "
                    "had no sample; name another --output."
                )

        with self.samples_file.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def replace(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace all samples of the file by others, in one step."""
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


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(map(_line, rows)))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
