r"""Tasks: questions with known answers, and the instruction for the model.

Public files are read in their published form: MATH-500, AIME and AMC (`problem`, `answer`),
GSM8K (`question`, and an `answer` with its working that ends in ``#### N``). Any other file with
`problem` (or `question`) and `answer` is a task too, and a known name may have its own questions.
"""

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexalign.data.columns import check_columns, renamed, require_columns
from flexalign.data.files import BadRow, Row, read_rows
from flexalign.data.folders import split_of
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.answers import is_prose
from flexalign.evaluation.grading import Grader
from flexalign.models.names import known_name, known_names

DATA_VARIABLE = "FLEXALIGN_DATA"
"""The environment variable that names the folder of the public files."""

MATHEMATICS = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction after the questions of public tasks. Questions of other files are asked without
one, as `flexalign sample` and a server's clients ask them."""

_FILES = {
    "math500": ("math", "math500", "math-500", "MATH-500"),
    "aime": ("aime", "aime24", "aime2024"),
    "aime25": ("aime25", "aime2025"),
    "amc": ("amc", "amc23"),
    "gsm8k": ("gsm8k_test", "gsm8k"),
}
_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
_ALIASES = {"math": "math500", "aime24": "aime", "aime2024": "aime", "aime2025": "aime25"}

_IDS = ("unique_id", "id")

_AIME_SAMPLES = 32
_SHOWN = 5


@dataclass(frozen=True)
class TaskSampling:
    """The default sampling options of a task; those of the paper if not given.

    Attributes:
        samples: Responses to each question.
        temperature: Sampling temperature.
        top_p: Share of probability that nucleus sampling keeps.
        max_new_tokens: Number of tokens at which a response is cut off.
    """

    samples: int = 8
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 16_384


@dataclass(frozen=True)
class TaskQuestion:
    """One question.

    Attributes:
        id: Unique in its task: the file's own id, else the row's number from 1.
        problem: The text of the question.
        gold: The known answer.
    """

    id: str
    problem: str
    gold: str


@dataclass(frozen=True)
class Task:
    r"""Questions, with an instruction and sampling options.

    Attributes:
        name: The task's name, such as ``math500``; for a user's file, its stem.
        questions: The questions, in the file's order.
        instruction: The text after every problem, separated by an empty line; may be empty.
        sampling: The default sampling options.
    """

    name: str
    questions: tuple[TaskQuestion, ...]
    instruction: str = MATHEMATICS
    sampling: TaskSampling = field(default_factory=TaskSampling)

    def messages(self, question: TaskQuestion) -> list[dict[str, str]]:
        """Return the conversation that asks a question, for a chat template."""
        text = question.problem
        if self.instruction:
            text = f"{text}\n\n{self.instruction}"
        return [{"role": "user", "content": text}]

    @property
    def content_hash(self) -> str:
        """Hash of instruction and questions: 16 hexadecimal digits, equal on all machines."""
        content = [self.instruction, *([q.id, q.problem, q.gold] for q in self.questions)]
        text = json.dumps(content, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def task_names() -> list[str]:
    """Return the names of all tasks; `load_task` also takes paths of files."""
    return [*_FILES, *(entry.name for entry in known_names() if entry.task is not None)]


def load_task(
    name_or_path: str,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    instruction: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Task:
    """Load a task.

    Args:
        name_or_path: One of `task_names` (case and hyphens are ignored, so that ``MATH-500`` is
            known), a part of one (``NAME:PART``), or the path of a file or
            folder that `flexalign.data.files.read_rows` takes, with `problem` (or `question`) and
            `answer`, and optionally `id` or `unique_id`.
        data: The folder of the public files, or the file itself; the environment variable
            FLEXALIGN_DATA if not given.
        limit: The number of questions, which are drawn with `seed` and stay in order; if a known
            name makes its questions, the number that is made. If not given, all questions, or the
            known name's own number.
        seed: Seed of that draw.
        instruction: The text after every problem; the task's own if not given (none for a file).
        columns: A file's own names for fields, such as ``{"problem": "query", "answer": "key"}``;
            of other columns only `id` and `unique_id` are read.

    Raises:
        ConfigError: If the name is not known, the public file is not found, or `columns` names an
            unknown field or is given for a task that is no file of yours.
        DataError: If rows lack a field or cannot be read (the message names the first few by
            line), ids are not unique, or there is no row.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 question, got {limit}.")
    name = name_or_path.lower().replace("-", "")
    name = _ALIASES.get(name, name)

    entry, part = known_name(name) or (None, "")
    is_known = name in _FILES or (entry is not None and entry.task is not None)
    if is_known and columns is not None:
        raise ConfigError(f"columns is for files, and {name_or_path} has rows of its own.")
    if entry is not None and entry.task is not None:
        task: Task = entry.task(part, limit)
        return task if instruction is None else replace(task, instruction=instruction)

    own = ""
    if name in _FILES:
        questions, own = _read(_public_file(name, data)), MATHEMATICS
    else:
        path = Path(name_or_path).expanduser()
        if not path.exists() and split_of(path)[1] is None:
            raise ConfigError(
                f"there is no task and no file {name_or_path!r}; the tasks are "
                f"{', '.join(task_names())}, and a file needs `problem` and `answer`."
            )
        name, questions = Path(path.name.removesuffix(".gz")).stem, _read(path, columns)

    if limit is not None and limit < len(questions):
        chosen = sorted(random.Random(seed).sample(range(len(questions)), limit))
        questions = [questions[index] for index in chosen]
    return Task(name, tuple(questions), own if instruction is None else instruction)


def sample_warning(task: Task, samples: int) -> str | None:
    """Return a warning if a task is given too few samples, else None."""
    if not task.name.startswith("aime") or samples >= _AIME_SAMPLES:
        return None
    return (
        f"{task.name} has {len(task.questions)} questions, one of which is "
        f"{100 / len(task.questions):.1f} points: with {samples} samples each the figures will "
        f"hardly reproduce; take at least {_AIME_SAMPLES} (--samples {_AIME_SAMPLES})."
    )


def words_warning(task: Task) -> str | None:
    """Return a warning if known answers are words and nothing asks for a box, else None.

    A word in a sentence cannot be told from the rest of the sentence.
    """
    if "boxed" in task.instruction:
        return None
    words = [q.gold for q in task.questions if is_prose(q.gold) and "boxed" not in q.problem]
    if not words:
        return None
    return (
        f"{task.name}: {len(words)} of {len(task.questions)} known answers are words, such as "
        f"{words[0]!r}, which are found as bare text or in \\boxed{{}} alone; in a sentence they are "
        "unparsed. Ask for a box with --instruction 'Put your final answer within \\boxed{}.'"
    )


def unreadable_golds(task: Task, grader: Grader) -> list[TaskQuestion]:
    """Return the questions whose known answer cannot be parsed, so that no response can match it.

    Call it before sampling starts.
    """
    readable = grader.readable([question.gold for question in task.questions])
    return [q for q, fine in zip(task.questions, readable, strict=True) if not fine]


def _public_file(name: str, data: str | Path | None) -> Path:
    where = data or os.environ.get(DATA_VARIABLE)
    if not where:
        raise ConfigError(
            f"{name} is read from its public file, which does not come with flexalign; name its "
            f"folder with --data (data=) or {DATA_VARIABLE}."
        )
    folder = Path(where).expanduser()
    if folder.is_file():
        return folder
    names = [stem + ending for stem in _FILES[name] for ending in _ENDINGS]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise ConfigError(f"{folder} has no file of {name}; put one there, such as {names[0]}.")


def _read(path: Path, columns: Mapping[str, str] | None = None) -> list[TaskQuestion]:
    check_columns(columns)
    questions, bad = _sort_out(_renamed(path, columns))
    if bad:
        lines = [f"  {row.place}: {row.reason}" for row in bad[:_SHOWN]]
        if len(bad) > _SHOWN:
            lines.append(f"  and {len(bad) - _SHOWN} more")
        raise DataError(
            "\n".join([f"{path}: {len(bad)} rows cannot be asked; mend or remove them:", *lines])
        )
    if not questions:
        raise DataError(f"{path}: there are no questions in it.")
    return questions


def _renamed(path: Path, columns: Mapping[str, str] | None) -> Iterator[Row | BadRow]:
    """Yield a file's rows with the fields that `columns` names, and their ids.

    Raises:
        DataError: If no row has a column.
    """
    seen: dict[str, None] = {}
    for row in read_rows(path):
        if isinstance(row, BadRow):
            yield row
            continue
        seen.update(dict.fromkeys(row.value))
        ids = {key: row.value[key] for key in _IDS if key in row.value}
        yield Row(row.place, ids | renamed(row.value, columns))
    if seen:
        require_columns(path, columns, seen)


def _sort_out(rows: Iterable[Row | BadRow]) -> tuple[list[TaskQuestion], list[BadRow]]:
    questions: list[TaskQuestion] = []
    bad: list[BadRow] = []
    places: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        question = row if isinstance(row, BadRow) else _question(row, number)
        if isinstance(question, BadRow):
            bad.append(question)
        elif question.id in places:
            reason = f"the id {question.id!r} was given before, at {places[question.id]}"
            bad.append(BadRow(row.place, reason))
        else:
            places[question.id] = row.place
            questions.append(question)
    return questions, bad


def _question(row: Row, number: int) -> TaskQuestion | BadRow:
    problem = row.value.get("problem", row.value.get("question"))
    if problem is None:
        return BadRow(row.place, "no field `problem` (or `question`)")
    if not isinstance(problem, str) or not problem.strip():
        return BadRow(row.place, "`problem` is not a text, or is empty")
    if row.value.get("answer") is None:
        return BadRow(row.place, "no field `answer`")
    gold = _gold(row.value["answer"])
    if not gold:
        return BadRow(row.place, "`answer` is neither a text nor a number, or is empty")
    return TaskQuestion(_id(row.value, number), problem.strip(), gold)


def _gold(answer: Any) -> str | None:
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    if isinstance(answer, str):
        return answer.rpartition("####")[2].strip()
    return None


def _id(row: Mapping[str, Any], number: int) -> str:
    for key in _IDS:
        if row.get(key) is not None:
            return str(row[key])
    return str(number)
