"""Registers the known name ``miniature``: its models, its adapter, its questions and its traces."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexalign.errors import ConfigError
from flexalign.models.names import KnownName, register

if TYPE_CHECKING:
    from flexalign.evaluation.tasks import Task

_TASK_QUESTIONS = 500
_TASK_SEED = 20_000  # far from the seeds of the training data
_TRACES = 4000
_PROMPT_SEED = 10_000  # far from the seed of the traces


def _locate(part: str) -> Path:
    from flexalign.miniature import folder

    return folder(part or "reference")


def _task(part: str, limit: int | None) -> "Task":
    """Make the questions of ``miniature``, or of ``miniature:N`` with seed N."""
    from flexalign.evaluation.tasks import Task, TaskQuestion, TaskSampling
    from flexalign.miniature import make_questions

    if part and not part.isdecimal():
        raise ConfigError(
            f"miniature:{part} is no task; give miniature, or miniature:N with the seed of its "
            "questions (its models are systems, such as model:miniature:aligned)."
        )
    seed = int(part) if part else _TASK_SEED

    made = make_questions(limit or _TASK_QUESTIONS, seed)
    questions = (
        TaskQuestion(str(number), question.text, str(question.answer))
        for number, question in enumerate(made, start=1)
    )
    return Task(
        f"miniature:{part}" if part else "miniature",
        tuple(questions),
        instruction="",
        sampling=TaskSampling(temperature=1.0, top_p=1.0, max_new_tokens=1000),
    )


def _traces() -> list[dict[str, Any]]:
    from flexalign.miniature import make_traces

    return make_traces(_TRACES, seed=0)


def _prompts(count: int) -> list[dict[str, Any]]:
    from flexalign.miniature import make_questions

    return [
        {"prompt": [{"role": "user", "content": one.text}], "answer": str(one.answer)}
        for one in make_questions(count, _PROMPT_SEED)
    ]


register(
    KnownName(
        "miniature",
        _locate,
        models=("miniature", "miniature:aligned"),
        has_parts=True,
        pair=("miniature", "miniature:aligned"),
        dial=("miniature", "miniature:fast"),
        task=_task,
        accuracy=0.75,
        traces=_traces,
        prompts=_prompts,
    )
)
