"""A results folder: its configuration, its questions, and samples that are written as they come.

``run.json`` is written first and says what the samples are; a sweep that goes on must agree with
it. ``samples.jsonl`` grows by whole batches. Both are plain files that other tools may read.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexalign.data.trace_run import drop_half_line
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.systems import Key
from flexalign.evaluation.tasks import Task

__all__ = ["FORMAT_VERSION", "ResultsFolder", "differences", "write_json"]

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
            different = differences(folder.configuration, expected)
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


def differences(found: Any, asked: Any, place: str = "") -> list[str]:
    """Say in which places two JSON values differ."""
    if isinstance(found, dict) and isinstance(asked, dict):
        return [
            text
            for key in dict.fromkeys([*found, *asked])
            for text in differences(
                found.get(key), asked.get(key), f"{place}.{key}" if place else str(key)
            )
        ]
    if isinstance(found, list) and isinstance(asked, list) and len(found) == len(asked):
        return [
            text
            for index, pair in enumerate(zip(found, asked, strict=True))
            for text in differences(*pair, f"{place}[{index}]")
        ]
    if found == asked:
        return []
    return [f"{place}: {_short(found)} there, {_short(asked)} asked"]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once: nobody ever reads half of it."""
    _write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write_text(path, "".join(map(_line, rows)))


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    """A value in a few words; of named things their names."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = [item.get("id", item.get("name", item)) for item in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
