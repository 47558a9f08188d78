"""Policies over a dial's two ends, put together from the answers of both to the same questions.

Adaptive and route policies choose between the fast end's answer and the slow end's. With one
answer of each end to every question, every threshold and every share can be judged on them at
once, and all meet the same luck.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from flexalign.errors import DataError
from flexalign.evaluation.chord_intervals import Measured, distance_intervals
from flexalign.evaluation.statistics import (
    Interval,
    clustered_interval,
    paired_difference_interval,
)
from flexalign.miniature.build import encode
from flexalign.miniature.measure import is_right
from flexalign.miniature.world import Question

__all__ = ["Answers", "Worth", "adaptive", "coin", "confidences", "judge", "weigh"]


@dataclass(frozen=True)
class Answers:
    """One answer to each of N questions.

    Attributes:
        right: Whether it is right, shape (N,).
        tokens: What it cost, rejected answers included, shape (N,).
    """

    right: NDArray[np.bool_]
    tokens: NDArray[np.int64]

    @property
    def mean_tokens(self) -> float:
        """Mean tokens an answer."""
        return float(self.tokens.mean())


@dataclass(frozen=True)
class Worth:
    """What a setting is worth; all intervals are of 95 %.

    Attributes:
        accuracy: Share of right answers.
        tokens: Mean tokens an answer.
        difference: Accuracy less that of the slow end, paired by question.
        over_coin: Height over the straight line between the two ends, whose own error counts; the
            ends themselves are on it.
    """

    accuracy: Interval
    tokens: Interval
    difference: Interval
    over_coin: Interval


def judge(questions: Sequence[Question], traces: Sequence[Sequence[str]]) -> Answers:
    """Judge one trace for each question."""
    right = [is_right(question, trace) for question, trace in zip(questions, traces, strict=True)]
    return Answers(np.array(right), np.array([len(trace) for trace in traces]))


@torch.no_grad()
def confidences(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    traces: Sequence[Sequence[str]],
    lam: float = 1.0,
) -> NDArray[np.float64]:
    """The probability of each answer under a dial at λ, its end included, shape (N,).

    It is the measure ``answer_probability`` of :class:`flexalign.Adaptive`.
    """
    rows = [
        encode(tokenizer, question.text, list(trace))
        for question, trace in zip(questions, traces, strict=True)
    ]
    found = np.zeros(len(rows))
    shapes = [(len(asked), len(answered)) for asked, answered in rows]
    for asked_tokens, answered_tokens in sorted(set(shapes)):
        chosen = [i for i, shape in enumerate(shapes) if shape == (asked_tokens, answered_tokens)]
        ids = torch.tensor([rows[i][0] + rows[i][1] for i in chosen])
        logits = model(input_ids=ids, lam=lam).logits[:, asked_tokens - 1 : -1]
        tokens = logits.double().log_softmax(-1).gather(-1, ids[:, asked_tokens:, None])
        found[chosen] = tokens[..., 0].sum(-1).exp().numpy()
    return found


def adaptive(
    fast: Answers, slow: Answers, confidence: NDArray[np.float64], threshold: float
) -> Answers:
    """The fast answer where it is sure enough, else the slow one; a rejected one is paid for."""
    _require_same(fast, slow)
    accepted = confidence >= threshold
    return Answers(
        np.where(accepted, fast.right, slow.right),
        fast.tokens + np.where(accepted, 0, slow.tokens),
    )


def coin(fast: Answers, slow: Answers, share: float, seed: int = 0) -> Answers:
    """The slow answer with probability `share`, else the fast one, whatever is asked."""
    _require_same(fast, slow)
    draw = random.Random(seed)
    is_slow = np.array([draw.random() < share for _ in fast.right])
    return Answers(
        np.where(is_slow, slow.right, fast.right), np.where(is_slow, slow.tokens, fast.tokens)
    )


def weigh(answers: Answers, fast: Answers, slow: Answers) -> Worth:
    """Say what a setting is worth beside the dial's two ends, on the same questions."""
    _require_same(answers, slow)
    questions = range(len(slow.right))
    measured = [Measured(one.right, one.tokens, questions) for one in (slow, fast, answers)]
    place = next((i for i, end in enumerate((slow, fast)) if end is answers), 2)
    distances = distance_intervals(measured, ends=(0, 1))
    chords = [one.chord for one in distances if one.chord is not None]
    return Worth(
        clustered_interval(answers.right, questions, share=True),
        clustered_interval(answers.tokens, questions, share=False),
        paired_difference_interval(answers.right, questions, slow.right, questions),
        chords[place],
    )


def _require_same(first: Answers, second: Answers) -> None:
    if len(first.right) != len(second.right):
        raise DataError(
            f"{len(first.right)} answers stand beside {len(second.right)}; "
            "both ends must answer the same questions."
        )
