"""Answers that an earlier sweep has left in its results folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexalign.calibration.outcomes import Outcomes
from flexalign.errors import ConfigError, DataError

__all__ = ["StoredAnswers"]

_NEEDED = ("system", "setting", "task", "question", "sample", "status", "tokens")


class StoredAnswers:
    """The samples of one system and task, to be asked as if they were drawn now.

    Args:
        folder: A results folder, with ``samples.jsonl``.
        system: The system's name; may be left out if there is one.
        task: The task's name; likewise.

    Raises:
        ConfigError: If the folder has no samples, or several systems or tasks and none is named.
        DataError: If a line lacks a field (named by line).
    """

    def __init__(self, folder: Path, system: str | None = None, task: str | None = None) -> None:
        self._path = folder / "samples.jsonl"
        if not self._path.is_file():
            raise ConfigError(f"{self._path} is not there; name the --output of an evaluate run.")
        rows = [self._row(number, line) for number, line in enumerate(self._lines(), start=1)]
        for key, wanted in (("system", system), ("task", task)):
            names = {row[key] for row in rows}
            if wanted is None and len(names) > 1:
                raise ConfigError(
                    f"{self._path} has more than one {key} ({', '.join(sorted(names))}); name one."
                )
            rows = [row for row in rows if wanted in (None, row[key])]
        if not rows:
            raise ConfigError(f"{self._path} has no samples of {system or task or 'any system'}.")
        self.system: str = rows[0]["system"]
        """Whose samples these are."""
        self.task: str = rows[0]["task"]
        """On which task."""
        self._rows: dict[str, dict[str, dict[int, tuple[bool, float]]]] = {}
        for row in rows:
            of_setting = self._rows.setdefault(row["setting"], {})
            answer = (row["status"] == "correct", float(row["tokens"]))
            of_setting.setdefault(row["question"], {})[row["sample"]] = answer

    @property
    def settings(self) -> list[str]:
        """Ids of the settings, in the file's order."""
        return list(self._rows)

    @property
    def questions(self) -> list[str]:
        """Questions that every setting has answered, in the file's order."""
        first, *others = self._rows.values()
        return [question for question in first if all(question in other for other in others)]

    @property
    def samples(self) -> int:
        """Samples that every setting has of each of these questions."""
        return min(
            len(of_setting[question])
            for of_setting in self._rows.values()
            for question in self.questions
        )

    def ask(self, setting: str, questions: Sequence[str], samples: int) -> Outcomes:
        """Return stored answers; the engine's `Ask`.

        Raises:
            DataError: If they are not there.
        """
        answers = []
        for question in questions:
            stored = self._rows.get(setting, {}).get(question, {})
            if len(stored) < samples:
                raise DataError(
                    f"{self._path} has {len(stored)} samples of question {question} at {setting}, "
                    f"and {samples} are needed; sweep further, or ask for fewer --samples."
                )
            answers.append([stored[number] for number in sorted(stored)[:samples]])
        table = np.array(answers, dtype=np.float64)
        return Outcomes(table[..., 0] > 0, table[..., 1])

    def _lines(self) -> list[str]:
        text = self._path.read_text(encoding="utf-8")
        whole, _, _ = text.rpartition("\n")  # what follows the last line end was half written
        return whole.split("\n") if whole else []

    def _row(self, number: int, line: str) -> Mapping[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self._path}, line {number}: not JSON ({error}).") from error
        missing = [key for key in _NEEDED if key not in row]
        if missing:
            raise DataError(f"{self._path}, line {number}: no field {missing[0]!r}.")
        return dict(row)
