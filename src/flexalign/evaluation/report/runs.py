"""Results folders as `flexalign evaluate` writes them, read for the report.

Responses may fill gigabytes, so a file is gone through once for the figures of every sample and
a second time only for the few responses that are shown.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flexalign.data.files import Row, read_rows
from flexalign.errors import DataError
from flexalign.evaluation.samples import Samples
from flexalign.evaluation.summary import Summary, SummaryRow
from flexalign.evaluation.systems import tell_apart

_FIELDS = ("system", "setting", "task", "question", "sample", "tokens", "status")


class RowKey(NamedTuple):
    """What a row of a summary and its samples have in common."""

    system: str
    setting: str
    task: str

    @classmethod
    def of(cls, row: SummaryRow) -> "RowKey":
        """The key of a summary's row."""
        return cls(row.system, row.setting, row.task)


@dataclass(frozen=True)
class ReportRun:
    """One results folder.

    Attributes:
        folder: Where it lies.
        label: What tells it from other runs in the same report; empty for a run by itself.
    """

    folder: Path
    label: str = ""

    @classmethod
    def open_all(cls, folders: Sequence[Path]) -> list["ReportRun"]:
        """Open one or several folders, labelled by as much of their path as tells them apart.

        Raises:
            DataError: If there is no folder, one twice, or one without results.
        """
        if not folders:
            raise DataError("a report needs at least one results folder.")
        resolved = [folder.resolve() for folder in folders]
        if len(set(resolved)) < len(resolved):
            raise DataError("the same results folder is given twice; give each once.")
        labels = tell_apart(resolved) if len(folders) > 1 else [""]
        runs = [cls(folder, label) for folder, label in zip(folders, labels, strict=True)]
        for run in runs:
            run.require()
        return runs

    def require(self) -> None:
        """Check that the folder holds results.

        Raises:
            DataError: If a file is missing.
        """
        for name in ("summary.json", "questions.jsonl", "samples.jsonl"):
            if not (self.folder / name).is_file():
                raise DataError(
                    f"{self.folder} has no {name}; give a folder that `flexalign evaluate "
                    "--output` has finished."
                )

    @cached_property
    def summary(self) -> Summary:
        """`summary.json`.

        Raises:
            DataError: If it is damaged.
        """
        value = self._json("summary.json", ("rows", "means", "environment"))
        try:
            return Summary.from_json(value)
        except (KeyError, TypeError, ValueError) as error:
            path = self.folder / "summary.json"
            raise DataError(f"{path} is damaged ({error!r}); evaluate again.") from error

    @cached_property
    def questions(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Rows of `questions.jsonl` by (task, question)."""
        rows = self._rows("questions.jsonl", ("task", "question", "problem", "gold"))
        return {(row["task"], row["question"]): row for row in rows}

    @cached_property
    def samples(self) -> dict[RowKey, Samples]:
        """All samples, without their texts, by setting and task, in the order of the file."""
        found: dict[RowKey, list[dict[str, Any]]] = {}
        for row in self.responses():
            key = RowKey(row["system"], row["setting"], row["task"])
            found.setdefault(key, []).append({name: row[name] for name in _FIELDS[3:]})
        return {key: Samples.from_rows(rows) for key, rows in found.items()}

    def responses(self) -> Iterator[dict[str, Any]]:
        """Go through the rows of `samples.jsonl`."""
        yield from self._rows("samples.jsonl", _FIELDS)

    def _rows(self, name: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        path = self.folder / name
        for row in read_rows(path):
            if not isinstance(row, Row):
                raise DataError(
                    f"{path}, {row.place}: {row.reason}; run `flexalign evaluate` again with the "
                    "same arguments, which mends the file."
                )
            missing = [field for field in fields if field not in row.value]
            if missing:
                raise DataError(f"{path}, {row.place}: the field {missing[0]!r} is missing.")
            yield row.value

    def _json(self, name: str, fields: Sequence[str]) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); evaluate again.") from None
        missing = [field for field in fields if field not in value]
        if missing:
            raise DataError(f"{path}: the field {missing[0]!r} is missing; evaluate again.")
        return dict(value)
