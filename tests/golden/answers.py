"""Made-up results folders, in the form that `flexalign evaluate` writes.

Every sample is drawn by a seeded `random.Random`, with sums and products alone, so that a folder
is the same on every machine. The text of a response has the grade that its row names:
`flexalign evaluate --regrade` finds the same statuses again.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 1000
"""Tokens at which a made-up response is cut off."""

Row = dict[str, Any]
Keep = Callable[[str, str, str, str, int], bool]
"""Whether a folder holds a sample: of system, setting, task, question and number."""


@dataclass(frozen=True)
class Setting:
    """How one setting of a system answers.

    Attributes:
        id: As results folders name it.
        right: Chance of a right answer to a question of middling difficulty.
        tokens: Mean length to a question of middling length.
        lam: λ, if the setting is one number.
        policy: The JSON form of any other dial.
        effort: The effort that it was asked for as.
        fast: Chance that an adaptive dial's fast answer ends by itself; None for other dials.
    """

    id: str
    right: float
    tokens: float
    lam: float | None = None
    policy: Mapping[str, Any] | None = None
    effort: float | None = None
    fast: float | None = None


@dataclass(frozen=True)
class Task:
    """Questions `1` to `count`, whose known answers are whole numbers."""

    name: str
    count: int

    @property
    def golds(self) -> dict[str, str]:
        """The known answers by question."""
        return {str(n): self.gold(str(n)) for n in range(1, self.count + 1)}

    def gold(self, question: str) -> str:
        """The known answer to one question."""
        return str(7 * int(question) + len(self.name))

    def write(self, folder: Path) -> Path:
        """Write the questions as a file that `--task` takes."""
        path = folder / f"{self.name}.jsonl"
        rows = [{"problem": f"what is {q}", "answer": gold} for q, gold in self.golds.items()]
        write_rows(path, rows)
        return path


def write_results(
    folder: Path,
    systems: Mapping[str, Sequence[Setting]],
    tasks: Sequence[Task],
    samples: int,
    *,
    seed: int = 0,
    baseline: str | None = None,
    configuration: Mapping[str, Any] | None = None,
    keep: Keep = lambda *_: True,
) -> Path:
    """Write run.json, questions.jsonl and samples.jsonl.

    Args:
        folder: Where; made if it is not there.
        systems: The settings of each system.
        tasks: What they answer.
        samples: Answers to each question.
        seed: Of all of it.
        baseline: As the configuration names it.
        configuration: In place of a made-up one, that of a real sweep.
        keep: Says which samples are there.
    """
    rows = [
        _sample(system, setting, task, question, sample, seed)
        for system, settings in systems.items()
        for task in tasks
        for question in task.golds
        for sample in range(samples)
        for setting in settings
        if keep(system, setting.id, task.name, question, sample)
    ]
    made_up = _configuration(systems, tasks, samples, baseline)
    return _write(folder, configuration or made_up, tasks, rows)


def write_counts(folder: Path, counts: Mapping[str, tuple[int, int]]) -> Path:
    """Write a results folder of which only the shares of right answers are known.

    Args:
        folder: Where; made if it is not there.
        counts: By system: how many of its answers are right, and how many questions it was asked,
            once each.
    """
    setting = Setting("as it is", 0, 0)
    tasks = [Task(f"of{count}", count) for count in sorted({count for _, count in counts.values()})]
    rows = [
        _row(system, setting, task, question, 0, "correct" if place < right else "wrong", 10)
        for system, (right, count) in counts.items()
        for task in tasks
        if task.count == count
        for place, question in enumerate(task.golds)
    ]
    systems = dict.fromkeys(counts, (setting,))
    return _write(folder, _configuration(systems, tasks, 1, None), tasks, rows)


def _configuration(
    systems: Mapping[str, Sequence[Setting]],
    tasks: Sequence[Task],
    samples: int,
    baseline: str | None,
) -> dict[str, Any]:
    """The parts of a sweep's configuration that a summary reads."""
    return {
        "systems": [
            {
                "name": name,
                "kind": "dial",
                "thinking_tags": ["<think>", "</think>"],
                "settings": [
                    {"id": s.id, "lambda": s.lam, "policy": s.policy, "effort": s.effort}
                    for s in settings
                ],
            }
            for name, settings in systems.items()
        ],
        "tasks": [{"name": t.name, "questions": t.count, "hash": "0" * 16} for t in tasks],
        "sampling": {"samples": samples, "seed": 0},
        "baseline": baseline,
    }


def _write(
    folder: Path, configuration: Mapping[str, Any], tasks: Sequence[Task], rows: Sequence[Row]
) -> Path:
    run = {
        "format_version": 1,
        "configuration": configuration,
        "environments": [{"flexalign": "0.1.0"}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run, ensure_ascii=False), encoding="utf-8")
    questions = [
        {"task": task.name, "question": question, "problem": f"what is {question}", "gold": gold}
        for task in tasks
        for question, gold in task.golds.items()
    ]
    write_rows(folder / "questions.jsonl", questions)
    write_rows(folder / "samples.jsonl", rows)
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _sample(
    system: str, setting: Setting, task: Task, question: str, sample: int, seed: int
) -> Row:
    asked = random.Random(f"{seed} {task.name} {question}")
    ease, length = asked.random(), asked.random()
    luck = random.Random(f"{seed} {task.name} {question} {sample}")  # all settings share it
    own = random.Random(f"{seed} {system} {setting.id} {task.name} {question} {sample}")

    drawn = 0.6 * luck.random() + 0.4 * own.random()
    tokens = int(
        setting.tokens * (0.5 + length) * (0.3 + 1.4 * luck.random() * (0.5 + own.random()))
    )
    status = _status(drawn, setting.right + 0.9 * (ease - 0.5), own.random())
    if tokens >= LIMIT:
        tokens, status = LIMIT, "truncated"
    row = _row(system, setting, task, question, sample, status, tokens)
    if setting.fast is not None:
        is_fast = own.random() < setting.fast
        sure = round(0.5 * (1 - drawn) + 0.5 * own.random(), 3)  # with some ties
        row |= {"route": "fast" if is_fast else "slow", "confidence": sure}
        row |= {} if is_fast else {"rejected_tokens": 20, "tokens": tokens + 20}
    return row


def _row(
    system: str,
    setting: Setting,
    task: Task,
    question: str,
    sample: int,
    status: str,
    tokens: int,
) -> Row:
    text, extracted = _response(status, task.gold(question))
    return {
        "system": system,
        "setting": setting.id,
        "lambda": setting.lam,
        "policy": setting.policy,
        "task": task.name,
        "question": question,
        "sample": sample,
        "seed": int(hashlib.sha256(f"{question} {sample}".encode()).hexdigest()[:7], 16),
        "prompt_hash": hashlib.sha256(question.encode()).hexdigest()[:16],
        "response": text,
        "tokens": tokens,
        "thinking_tokens": tokens // 3 if "</think>" in text else tokens,
        "rejected_tokens": 0,
        "finish": "length" if status == "truncated" else "stop",
        "route": None,
        "confidence": None,
        "status": status,
        "extracted": extracted,
    }


def _status(drawn: float, chance: float, kind: float) -> str:
    if drawn < chance:
        return "correct"
    shares = (("wrong", 0.6), ("unparsed", 0.75), ("no_answer", 0.87), ("truncated", 1.0))
    return next(status for status, share in shares if kind < share)


def _response(status: str, gold: str) -> tuple[str, str | None]:
    if status == "correct":
        return f"<think>so</think>The answer is \\boxed{{{gold}}}.", gold
    if status == "wrong":
        return f"<think>so</think>The answer is \\boxed{{{gold}1}}.", f"{gold}1"
    if status == "unparsed":
        return "<think>so</think>I do not know.\nNo idea.", None
    return ("<think>so</think>" if status == "no_answer" else "<think>so"), None
