"""The miniature: a small world, models trained on it, and the exact results for them.

The weights are part of the package, so that all of flexalign can be tried, and compared with exact
results, on one core in minutes.
"""

import random
from pathlib import Path
from typing import Any

from flexalign.errors import ConfigError
from flexalign.miniature.world import (
    ALIGNED,
    CONCISE,
    REFERENCE,
    SYSTEM,
    Habits,
    Question,
    sample_question,
    sample_trace,
)

__all__ = [
    "ALIGNED",
    "CONCISE",
    "PARTS",
    "REFERENCE",
    "SYSTEM",
    "Habits",
    "Question",
    "folder",
    "make_questions",
    "make_traces",
]

PARTS = ("reference", "aligned", "fast", "hybrid", "dial", "concise")
"""The parts in the package. `miniature:PART` can be given in place of a path. The first two are
models; `fast` is an InRa adapter on the reference. `hybrid` is a model that has the reference's
habits, and the aligned ones under the system message `SYSTEM`. `dial` is one LoRA on the reference,
whose strength is λ from 0 to 5. `concise` is a model, a PEFT adapter on the reference, that differs
from it in the habit `again` alone."""

_WEIGHTS = Path(__file__).parent / "weights"


def folder(part: str) -> Path:
    """Return the folder of one of the miniature's parts.

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
        count: Number of rows.
        seed: Seed of questions and traces.
        habits: The habits of the traces.
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
