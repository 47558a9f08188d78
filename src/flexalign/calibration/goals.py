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
from flexalign.evaluation._student import t_quantile
from flexalign.evaluation.statistics import Interval, paired_difference_interval

__all__ = ["Goal", "NonInferiority", "TokenBudget", "accuracy_difference", "lower_bound"]


class Goal(Protocol):
    """A promise and a preference."""

    @property
    def lowest(self) -> float:
        """The least a question's slack can be; −inf where it has no bound."""

    @property
    def unit(self) -> float:
        """The size of a large difference of two questions' slacks."""

    @property
    def least_deviation(self) -> float:
        """Standard deviation over questions below which the proof does not believe the data."""

    @property
    def step(self) -> float:
        """How far a single question can jump; 0 where it moves evenly."""

    @property
    def text(self) -> str:
        """The promise as a clause."""

    def slack(self, candidate: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        """Slack a question, shape (n,)."""

    def gain(self, candidate: Outcomes, reference: Outcomes) -> float:
        """What is to be large; a setting without positive gain is not worth choosing."""


def lower_bound(slack: NDArray[np.float64], goal: Goal, level: float) -> float:
    """Lower bound of the mean slack at one-sided error `level`, clustered by question.

    Student's, with a deviation of at least ``goal.least_deviation`` and less half a question's
    largest step, Yates's correction: without the floor (and with a score interval too) rare whole
    losses go unseen at early looks and break the promise.

    Args:
        slack: One value a question, shape (n,), at least 2.
        goal: Gives the least deviation and the step.
        level: One-sided error, in (0, 0.5).
    """
    deviation = max(float(slack.std(ddof=1)), goal.least_deviation)
    half = t_quantile(1 - 2 * level, slack.size - 1) * deviation / math.sqrt(slack.size)
    return float(slack.mean()) - half - goal.step / (2 * slack.size)


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
    def least_deviation(self) -> float:
        """That of whole losses, right throughout to wrong throughout, on a share `margin`.

        A few dozen questions may show none of them, and then all that is seen is the noise.
        """
        return math.sqrt(self.margin * (1 - self.margin))

    @property
    def step(self) -> float:
        """From right to wrong."""
        return 1.0

    @property
    def text(self) -> str:
        """The promise as a clause."""
        return f"accuracy no more than {100 * self.margin:g} points below the reference's"

    def slack(self, candidate: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        """Difference of the shares of right answers, plus the margin."""
        return candidate.share_right() - reference.share_right() + self.margin

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
    def least_deviation(self) -> float:
        """The data are believed."""
        return 0.0

    @property
    def step(self) -> float:
        """Tokens move evenly."""
        return 0.0

    @property
    def text(self) -> str:
        """The promise as a clause."""
        return f"no more than {self.tokens:g} tokens a mean answer"

    def slack(self, candidate: Outcomes, reference: Outcomes) -> NDArray[np.float64]:
        """Budget less the question's mean tokens."""
        return np.asarray(self.tokens - candidate.tokens.mean(1), dtype=np.float64)

    def gain(self, candidate: Outcomes, reference: Outcomes) -> float:
        """Accuracy."""
        return candidate.accuracy
