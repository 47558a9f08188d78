"""Tokens saved against a reference: on one task, over tasks, and pooled.

A cut is 1 − tokens ÷ reference tokens; 0.6 means that 60 % were saved, a negative cut that more
were spent.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from flexalign.errors import DataError
from flexalign.evaluation.statistics import Interval, paired_ratio_interval

__all__ = ["token_cut", "token_cut_interval", "token_cut_mean", "token_cut_pooled"]


def token_cut(tokens: float, reference: float) -> float:
    """The cut of one task, from mean tokens.

    Raises:
        DataError: If the reference's tokens are not positive.
    """
    if not reference > 0:
        raise DataError(
            f"a token cut needs a reference that writes something, got {reference} tokens."
        )
    return 1 - tokens / reference


def token_cut_interval(
    tokens: ArrayLike,
    questions: Sequence[Hashable],
    reference_tokens: ArrayLike,
    reference_questions: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval:
    """The cut of one task with its interval: a ratio of means, paired and clustered by question.

    Args:
        tokens: Tokens of each sample, shape (n,).
        questions: The question of each.
        reference_tokens: Tokens of each of the reference's samples, shape (m,).
        reference_questions: The question of each.
        confidence: Coverage, in (0, 1).

    Raises:
        DataError: As for `paired_ratio_interval`.
    """
    ratio = paired_ratio_interval(
        tokens, questions, reference_tokens, reference_questions, confidence
    )
    return Interval(1 - ratio.high, 1 - ratio.mean, 1 - ratio.low)


def token_cut_mean(tokens: Sequence[float], references: Sequence[float]) -> float:
    """The unweighted mean of the tasks' cuts, as the paper's Table 1 gives it.

    Args:
        tokens: Mean tokens on each task.
        references: The reference's mean tokens on each task, in the same order.

    Raises:
        DataError: If there is no task, or a reference writes nothing.
    """
    _check(tokens, references)
    return float(np.mean([token_cut(*pair) for pair in zip(tokens, references, strict=True)]))


def token_cut_pooled(tokens: Sequence[float], references: Sequence[float]) -> float:
    """The cut of the tasks' mean tokens added up, so that long tasks count for more.

    Args:
        tokens: Mean tokens on each task.
        references: The reference's mean tokens on each task, in the same order.

    Raises:
        DataError: If there is no task, or the reference writes nothing.
    """
    _check(tokens, references)
    return token_cut(sum(tokens), sum(references))


def _check(tokens: Sequence[float], references: Sequence[float]) -> None:
    if not tokens or len(tokens) != len(references):
        raise DataError(
            f"token cuts over tasks need one figure each from both, got {len(tokens)} and "
            f"{len(references)}."
        )
