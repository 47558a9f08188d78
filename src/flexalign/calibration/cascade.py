"""Simulates the adaptive dial at any threshold, from pairs of a fast and a slow answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexalign.evaluation.samples import Samples


@dataclass(frozen=True)
class Cascade:
    """Fast and slow answers to the same questions, one of each for each sample, in the same order.

    The tokens and the accuracy of any threshold follow without further samples: a fast answer is
    accepted if its confidence is at least the threshold; otherwise the tokens of both answers
    count. Generation stops a fast answer as soon as its confidence is below the threshold, but its
    whole length is counted here, so tokens are overestimated by at most the fast answers' length
    times the share of rejected ones.

    Attributes:
        fast: The fast answers, with their confidence; −1 if an answer was cut off.
        slow: The slow answers.
    """

    fast: Samples
    slow: Samples

    @classmethod
    def of(cls, slow: Samples, adaptive: Samples) -> "Cascade":
        """Make the pairs of samples at λ = 0 and of the adaptive policy.

        Args:
            slow: Samples at λ = 0.
            adaptive: Samples of the adaptive policy at threshold 0, which accepts every complete
                fast answer.
        """
        is_whole = adaptive.route == "fast"
        fast = Samples(
            adaptive.question,
            adaptive.correct & is_whole,
            np.where(is_whole, adaptive.tokens, adaptive.rejected_tokens),
            confidence=np.where(is_whole, adaptive.confidence, -1.0),
        )
        return cls(fast, slow)

    def at(self, threshold: float) -> Samples:
        """Return the samples that the policy would return at a threshold."""
        return Samples(self.slow.question, self.correct(threshold), self.tokens(threshold))

    def tokens(self, threshold: float) -> NDArray[np.float64]:
        """Return each sample's tokens at a threshold, including rejected ones, shape (n,)."""
        rejected = self.fast.confidence < threshold
        both = self.fast.tokens + self.slow.tokens
        return self.fast.tokens * ~rejected + both * rejected

    def correct(self, threshold: float) -> NDArray[np.bool_]:
        """Return whether each sample is right at a threshold, shape (n,)."""
        return np.where(self.fast.confidence >= threshold, self.fast.correct, self.slow.correct)


def fit_thresholds(cascade: Cascade, efforts: Sequence[float]) -> list[float]:
    """Find the thresholds whose mean tokens are linear in effort.

    As a function of the threshold, mean tokens increase by one slow answer at each observed
    confidence. Between two observed confidences they are interpolated linearly, so that the map is
    continuous and monotone.

    Args:
        cascade: The measured pairs.
        efforts: Ascending, from 0 (threshold 0) to 100 (the slow answers' mean tokens).

    Returns:
        One threshold in [0, 1] for each effort, non-decreasing.
    """
    sure, slow = cascade.fast.confidence, cascade.slow.tokens

    # Mean tokens at each knot: all fast answers, and the slow answers in place of rejected ones.
    knots = np.union1d(sure.clip(0, 1), 1.0)
    order = np.argsort(sure, kind="stable")
    added = np.concatenate([[0.0], np.cumsum(slow[order])]) / sure.size
    rejected = np.searchsorted(sure[order], knots, side="left")
    tokens = cascade.fast.tokens.mean() + added[rejected]

    fastest, slowest = cascade.tokens(0.0).mean(), slow.mean()
    line = fastest + np.asarray(efforts, dtype=np.float64) / 100 * (slowest - fastest)
    thresholds = np.interp(line, tokens, knots)
    thresholds[np.asarray(efforts) == 0] = 0.0
    return [float(value) for value in np.maximum.accumulate(thresholds)]
