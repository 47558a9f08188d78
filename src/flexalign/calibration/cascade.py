"""The adaptive dial at every threshold, from one fast and one slow answer to each question."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexalign.evaluation.samples import Samples


@dataclass(frozen=True)
class Cascade:
    """A fast and a slow answer to the same questions, sample by sample in the same order.

    What a threshold costs and gets right follows without asking again: answers at least as sure
    are kept, the others pay for both. A fast answer that falls below its threshold is stopped
    there, and it is the whole one that is counted here, so that tokens are overstated by up to the
    fast answer's own length times the share of those rejected.

    Attributes:
        fast: The fast answers, with their confidence: −1 where an answer did not come to its end.
        slow: The slow answers.
    """

    fast: Samples
    slow: Samples

    @classmethod
    def of(cls, slow: Samples, adaptive: Samples) -> "Cascade":
        """Take both from what was sampled.

        Args:
            slow: Samples at λ = 0.
            adaptive: Samples of the adaptive policy at threshold 0: every fast answer that comes
                to its end is kept.
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
        """The samples that the policy of a threshold would have given."""
        return Samples(self.slow.question, self.correct(threshold), self.tokens(threshold))

    def tokens(self, threshold: float) -> NDArray[np.float64]:
        """Tokens written for each sample at a threshold, rejected ones included, shape (n,)."""
        rejected = self.fast.confidence < threshold
        both = self.fast.tokens + self.slow.tokens
        return self.fast.tokens * ~rejected + both * rejected

    def correct(self, threshold: float) -> NDArray[np.bool_]:
        """Which samples are right at a threshold, shape (n,)."""
        return np.where(self.fast.confidence >= threshold, self.fast.correct, self.slow.correct)


def fit_thresholds(cascade: Cascade, efforts: Sequence[float]) -> list[float]:
    """Find the thresholds whose mean tokens lie on the straight line of effort.

    Mean tokens as a function of the threshold rise by one question's slow answer at each observed
    confidence; between two observed confidences they are taken as a straight line, which makes
    the map continuous and monotone.

    Args:
        cascade: What was measured.
        efforts: Ascending, from 0 (threshold 0) to 100 (the slow answers' mean tokens).

    Returns:
        One threshold in [0, 1] for each effort, none below the one before.
    """
    sure, slow = cascade.fast.confidence, cascade.slow.tokens

    # Mean tokens at each knot: the fast answers, and the slow ones of those that it rejects.
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
