"""The responses that the page shows: a share of them, chosen so that settings can be compared.

One sample of every question under every setting comes before a second sample of any, and either
all settings of a question are there or none, so that the page compares like with like.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flexalign.data.thinking import ThinkingTags
from flexalign.evaluation.report.runs import ReportRun, RowKey

_Tasks = Mapping[str, Sequence[tuple[ReportRun, RowKey]]]
"""The settings of each task, in the order in which the page numbers them."""


def shown_responses(tasks: _Tasks, questions: int, megabytes: float) -> dict[str, Any]:
    """Choose responses and read them.

    Args:
        tasks: The settings of each task, in the order in which the page numbers them.
        questions: How many questions at most, shared evenly by the tasks.
        megabytes: How much text at most.

    Returns:
        ``questions``: of each its task, id, problem, known answer and ``responses``, each with
        the number of its setting; ``shown`` and ``total``: numbers of questions and responses.
    """
    chosen = {
        place
        for task, settings in tasks.items()
        for place in _chosen_questions(task, settings, max(1, questions // len(tasks)))
    }
    rounds = _rounds(tasks, chosen, int(megabytes * 1e6))

    shown: dict[tuple[str, str], dict[str, Any]] = {}
    for run in _runs(tasks):
        numbers = _numbers(tasks, run)
        for row in run.responses():
            place = (row["task"], row["question"])
            number = numbers.get(RowKey(row["system"], row["setting"], row["task"]))
            if number is None or row["sample"] >= rounds.get(place, 0):
                continue
            entry = shown.setdefault(place, _question(run, place))
            entry["responses"].append(_response(number, row))

    for entry in shown.values():
        entry["responses"].sort(key=lambda response: (response["setting"], response["sample"]))
    everything = {
        (task, question)
        for task, settings in tasks.items()
        for run, key in settings
        if key in run.samples
        for question in run.samples[key].questions
    }
    return {
        "questions": list(shown.values()),
        "shown": [len(shown), sum(len(entry["responses"]) for entry in shown.values())],
        "total": [
            len(everything),
            sum(len(s) for r in _runs(tasks) for s in r.samples.values()),
        ],
    }


def _chosen_questions(
    task: str, settings: Sequence[tuple[ReportRun, RowKey]], limit: int
) -> list[tuple[str, str]]:
    """The first questions of a task that every setting has, else the first that any has."""
    asked = [run.samples[key].questions for run, key in settings if key in run.samples]
    if not asked:
        return []
    common = set.intersection(*map(set, asked))
    pool = dict.fromkeys(question for part in asked for question in part)
    return [(task, question) for question in sorted(pool, key=lambda q: q not in common)[:limit]]


def _rounds(tasks: _Tasks, chosen: set[tuple[str, str]], budget: int) -> dict[tuple[str, str], int]:
    """How many samples of each chosen question fit, all settings of a question together."""
    sizes: dict[tuple[int, str, str], int] = {}
    for run in _runs(tasks):
        for row in run.responses():
            place = (row["task"], row["question"])
            if place in chosen:
                size = len(row["response"].encode("utf-8", "replace"))
                where = (int(row["sample"]), *place)
                sizes[where] = sizes.get(where, 0) + size

    rounds: dict[tuple[str, str], int] = {}
    for sample, task, question in sorted(sizes, key=lambda where: where[0]):
        budget -= sizes[sample, task, question]
        if budget < 0 and rounds:
            break
        rounds[task, question] = sample + 1
    return rounds


def _runs(tasks: _Tasks) -> list[ReportRun]:
    return list({run.folder: run for settings in tasks.values() for run, _ in settings}.values())


def _numbers(tasks: _Tasks, run: ReportRun) -> dict[RowKey, int]:
    return {
        key: number
        for settings in tasks.values()
        for number, (other, key) in enumerate(settings)
        if other.folder == run.folder
    }


def _question(run: ReportRun, place: tuple[str, str]) -> dict[str, Any]:
    row = run.questions.get(place, {"problem": "", "gold": ""})
    return {
        "task": place[0],
        "id": place[1],
        "problem": row["problem"],
        "gold": row["gold"],
        "responses": [],
    }


def _response(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    parts = ThinkingTags().split(row["response"], opened=bool(row.get("thinking_tokens")))
    return {
        "setting": number,
        "sample": row["sample"],
        "status": row["status"],
        "tokens": row["tokens"],
        "thinkingTokens": row.get("thinking_tokens"),
        "route": row.get("route"),
        "extracted": row.get("extracted"),
        "thinking": parts.thinking,
        "answer": parts.answer,
        "closed": parts.closed,
    }
