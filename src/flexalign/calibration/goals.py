"""What a setting has to keep, and what it is chosen for among those that keep it.

A goal turns outcomes into a *slack* a question, whose mean is above 0 exactly where the promise is
kept, and into a *gain*, by which settings that keep it are compared.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexalign.calibration.outcomes import Outcomes
from flexalign.errors import ConfigError
from flexalign.evaluation.statistics import (
    Interval,
    clustered_interval,
    paired_difference_interval,
)

__all__ = ["Goal", "NonInferiority", "TokenBudget", "accuracy_difference"]


class Goal(Protocol):
    """A promise and a preference."""

    @property
    def lowest(self) -> float:
        """The least a question's slack can be; −inf where it has no bound."""

    @property
    def unit(self) -> float:
        """The size of a large difference of two questions' slacks."""

    @property
    def text(self) -> str:
        """The promise as a clause."""

    def slack(self, candidate: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        """Slack a question, shape (n,)."""

    def bound(self, candidate: Outcomes, reference: Outcomes, level: float) -> float:
        """Lower bound of the mean slack at one-sided error `level`."""

    def gain(self, candidate: Outcomes, reference: Outcomes) -> float:
        """What is to be large; a setting without positive gain is not worth choosing."""


def accuracy_difference(
    candidate: Outcomes, reference: Outcomes, confidence: float = 0.95
) -> Interval:
    """Interval of accuracy(candidate) − accuracy(reference), paired by question."""
    clusters = candidate.clusters
    return paired_difference_interval(
        candidate.correct.ravel(), clusters, reference.correct.ravel(), clusters, confidence
    )


@dataclass(frozen=True)
class NonInferiority:
    """Fewest tokens such that accuracy is no more than a margin below the reference's.

    Attributes:
        margin: Largest loss of accuracy that is accepted, in (0, 1).

    Raises:
        ConfigError: If the margin is not in (0, 1).
    """

    margin: float

    def __post_init__(self) -> None:
        if not 0 < self.margin < 1:
            raise ConfigError(
                f"the margin must be between 0 and 1 (0.02 is two points), got {self.margin}."
            )

    @property
    def lowest(self) -> float:
        """From right throughout to wrong throughout."""
        return self.margin - 1

    @property
    def unit(self) -> float:
        """One answer's worth."""
        return 1.0

    @property
    def text(self) -> str:
        """The promise as a clause."""
        return f"accuracy no more than {100 * self.margin:g} points below the reference's"

    def slack(self, candidate: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        """Difference of the shares of right answers, plus the margin."""
        return candidate.share_right() - reference.share_right() + self.margin

    def bound(self, candidate: Outcomes, reference: Outcomes, level: float) -> float:
        """Lower end of the paired score interval, plus the margin."""
        return accuracy_difference(candidate, reference, 1 - 2 * level).low + self.margin

    def gain(self, candidate: Outcomes, reference: Outcomes) -> float:
        """Share of the reference's tokens that is saved."""
        return 1 - candidate.mean_tokens / reference.mean_tokens


@dataclass(frozen=True)
class TokenBudget:
    """Most accuracy such that the mean answer has no more than so many tokens.

    Attributes:
        tokens: The budget, mean tokens an answer.

    Raises:
        ConfigError: If it is not positive.
    """

    tokens: float

    def __post_init__(self) -> None:
        if not self.tokens > 0:
            raise ConfigError(f"the token budget must be above 0, got {self.tokens}.")

    @property
    def lowest(self) -> float:
        """Answers may be arbitrarily long."""
        return -math.inf

    @property
    def unit(self) -> float:
        """The budget itself."""
        return self.tokens

    @property
    def text(self) -> str:
        """The promise as a clause."""
        return f"no more than {self.tokens:g} tokens a mean answer"

    def slack(self, candidate: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        """Budget less the question's mean tokens."""
        return np.asarray(self.tokens - candidate.tokens.mean(1), dtype=np.float64)

    def bound(self, candidate: Outcomes, reference: Outcomes, level: float) -> float:
        """Budget less the upper end of the clustered interval."""
        tokens, clusters = candidate.tokens.ravel(), candidate.clusters
        return self.tokens - clustered_interval(tokens, clusters, 1 - 2 * level, share=False).high

    def gain(self, candidate: Outcomes, reference: Outcomes) -> float:
        """Accuracy."""
        return candidate.accuracy
