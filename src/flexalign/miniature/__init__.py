"""The miniature: a small world with a known answer, models trained on it, their closed forms.

The weights ship with the package, so everything that flexalign does can be tried, and checked
against the truth, on one core in minutes.
"""

import random
from pathlib import Path
from typing import Any

from flexalign.errors import ConfigError
from flexalign.miniature.world import (
    ALIGNED,
    REFERENCE,
    Habits,
    Question,
    sample_question,
    sample_trace,
)

__all__ = [
    "ALIGNED",
    "PARTS",
    "REFERENCE",
    "Habits",
    "Question",
    "folder",
    "make_questions",
    "make_traces",
]

PARTS = ("reference", "aligned", "fast")
"""What ships; `miniature:PART` names one wherever a path is taken. The first two are models,
`fast` is an InRa adapter on the reference."""

_WEIGHTS = Path(__file__).parent / "weights"


def folder(part: str) -> Path:
    """The folder of one of the miniature's parts.

    Raises:
        ConfigError: If there is no such part, or the installation lacks its weights.
    """
    if part not in PARTS:
        raise ConfigError(f"the miniature has no part {part!r}; it has {', '.join(PARTS)}.")
    path = _WEIGHTS / part
    if not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"the miniature's {part} weights are not installed; "
            f"reinstall flexalign, or make them with: flexalign miniature build --output {path.parent}"
        )
    return path


def make_questions(count: int, seed: int) -> list[Question]:
    """Draw questions from a seed."""
    rng = random.Random(seed)
    return [sample_question(rng) for _ in range(count)]


def make_traces(count: int, seed: int, habits: Habits = REFERENCE) -> list[dict[str, Any]]:
    """Draw questions with one trace each, as rows of TRL's conversational prompt–completion form.

    Args:
        count: How many rows.
        seed: Of questions and traces.
        habits: The way of thinking that writes the traces.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        question = sample_question(rng)
        trace = " ".join(sample_trace(question, habits, rng))
        rows.append(
            {
                "prompt": [{"role": "user", "content": question.text}],
                "completion": [{"role": "assistant", "content": trace}],
                "answer": str(question.answer),
            }
        )
    return rows
