"""The adaptive dial at every threshold, from one fast and one slow answer to each question."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ways:
    """Both ways of answering the same questions, one entry per sample.

    What a threshold costs and gets right follows without asking again: answers at least as sure
    are kept, the others pay for both ways. A fast answer that falls below its threshold is
    stopped there, and it is the whole one that is counted here, so that tokens are overstated by
    up to the fast answer's own length times the share of those rejected.

    Attributes:
        questions: The question of each, which intervals are clustered by.
        confidence: Of the fast answer; −1 where it did not come to its end.
        fast_tokens: Tokens of the fast answer.
        fast_correct: Whether it is right.
        slow_tokens: Tokens of the slow answer.
        slow_correct: Whether it is right.
    """

    questions: Sequence[str]
    confidence: Floats
    fast_tokens: Floats
    fast_correct: NDArray[np.bool_]
    slow_tokens: Floats
    slow_correct: NDArray[np.bool_]

    def tokens(self, threshold: float) -> Floats:
        """Tokens written for each sample at a threshold, rejected ones included."""
        rejected = self.confidence < threshold
        return self.fast_tokens * ~rejected + (self.fast_tokens + self.slow_tokens) * rejected

    def correct(self, threshold: float) -> NDArray[np.bool_]:
        """Which samples are right at a threshold."""
        return np.where(self.confidence >= threshold, self.fast_correct, self.slow_correct)


def fit_thresholds(ways: Ways, efforts: Sequence[float]) -> list[float]:
    """Find the thresholds whose mean tokens lie on the straight line of effort.

    Mean tokens as a function of the threshold rise by one question's slow answer at each observed
    confidence; between two observed confidences they are taken as a straight line, which makes
    the map continuous and monotone.

    Args:
        ways: What was measured.
        efforts: Ascending, from 0 (threshold 0) to 100 (the slow way's mean tokens).

    Returns:
        One threshold in [0, 1] for each effort, none below the one before.
    """
    knots = np.union1d(ways.confidence.clip(0, 1), 1.0)
    sure = ways.confidence
    order = np.argsort(sure, kind="stable")
    added = np.concatenate([[0.0], np.cumsum(ways.slow_tokens[order])]) / sure.size
    below = np.searchsorted(sure[order], knots, side="left")  # how many each knot rejects
    tokens = ways.fast_tokens.mean() + added[below]
    fastest, slowest = ways.tokens(0.0).mean(), ways.slow_tokens.mean()
    line = fastest + np.asarray(efforts, dtype=np.float64) / 100 * (slowest - fastest)
    thresholds = np.interp(line, tokens, knots)
    thresholds[np.asarray(efforts) == 0] = 0.0
    return [float(value) for value in np.maximum.accumulate(thresholds)]
