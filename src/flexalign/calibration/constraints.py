"""Constraints: the promise to prove for a setting, and the gain by which settings are chosen.

A constraint computes from samples a *slack* for each question, whose mean is above 0 exactly if the
promise is kept, and a *gain*, by which settings that keep it are compared.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexalign.errors import ConfigError
from flexalign.evaluation.samples import Samples
from flexalign.statistics import t_quantile


class Constraint(Protocol):
    """A promise about a setting, and a preference among settings that keep it."""

    @property
    def lowest(self) -> float:
        """Least possible slack of a question; −inf if it has no bound."""

    @property
    def unit(self) -> float:
        """The size of a large difference of two questions' slacks."""

    @property
    def least_deviation(self) -> float:
        """Least standard deviation over questions that the proof assumes."""

    @property
    def text(self) -> str:
        """The promise as a clause."""

    def slack(self, candidate: Samples, reference: Samples) -> NDArray[np.float64]:
        """Return the slack of each question, shape (n,).

        Args:
            candidate: Samples of the setting.
            reference: Samples of the reference on the same questions, in the same order.
        """

    def bound(self, slack: NDArray[np.float64], level: float) -> float:
        """Return the lower bound of the mean slack.

        Args:
            slack: One value for each question, shape (n,), at least 2.
            level: One-sided error, in (0, 0.5).
        """

    def gain(self, candidate: Samples, reference: Samples) -> float:
        """Return the figure that should be large; a setting is only chosen if it is positive."""


@dataclass(frozen=True)
class NonInferiority:
    """Fewest tokens such that accuracy is no more than a margin below the reference's.

    Attributes:
        margin: Largest permitted loss of accuracy, in (0, 1).

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
        """Slack of a question that changes from always right to always wrong."""
        return self.margin - 1

    @property
    def unit(self) -> float:
        """The size of a change from always right to always wrong."""
        return 1.0

    @property
    def least_deviation(self) -> float:
        """Standard deviation if a share `margin` of the questions changes from right to wrong.

        A few dozen questions may include no such change, and then show too small a deviation.
        """
        return math.sqrt(self.margin * (1 - self.margin))

    @property
    def text(self) -> str:
        """The promise as a clause."""
        return f"accuracy no more than {100 * self.margin:g} points below the reference's"

    def slack(self, candidate: Samples, reference: Samples) -> NDArray[np.float64]:
        """Return the difference of the shares of right answers, plus the margin, shape (n,)."""
        right = candidate.by_question(candidate.correct)
        return right - reference.by_question(reference.correct) + self.margin

    def bound(self, slack: NDArray[np.float64], level: float) -> float:
        """Return Student's bound, with two corrections for losses of whole questions.

        The deviation is at least `least_deviation`, and half a question is subtracted (Yates).
        Without them, rare losses are missed at early looks; a score interval misses them too.
        """
        count = slack.size
        deviation = max(float(slack.std(ddof=1)), self.least_deviation)
        half = t_quantile(1 - 2 * level, count - 1) * deviation / math.sqrt(count)
        return float(slack.mean()) - half - 1 / (2 * count)

    def gain(self, candidate: Samples, reference: Samples) -> float:
        """Return the share of the reference's tokens that is saved."""
        return 1 - candidate.mean_tokens / reference.mean_tokens


@dataclass(frozen=True)
class TokenBudget:
    """Highest accuracy such that answers have on average no more tokens than a budget.

    Attributes:
        tokens: The budget: mean tokens of an answer.

    Raises:
        ConfigError: If it is not positive.
    """

    tokens: float

    def __post_init__(self) -> None:
        if not self.tokens > 0:
            raise ConfigError(f"the token budget must be above 0, got {self.tokens}.")

    @property
    def lowest(self) -> float:
        """−inf, as answers may be arbitrarily long."""
        return -math.inf

    @property
    def unit(self) -> float:
        """The budget itself."""
        return self.tokens

    @property
    def least_deviation(self) -> float:
        """0: the standard deviation of the data is used as it is."""
        return 0.0

    @property
    def text(self) -> str:
        """The promise as a clause."""
        return f"no more than {self.tokens:g} tokens a mean answer"

    def slack(self, candidate: Samples, reference: Samples) -> NDArray[np.float64]:
        """Return the budget minus each question's mean tokens, shape (n,)."""
        return self.tokens - candidate.by_question(candidate.tokens)

    def bound(self, slack: NDArray[np.float64], level: float) -> float:
        """Return Johnson's bound, as a few long answers make the mean's distribution skewed.

        Johnson 1978, "Modified t tests and confidence intervals for asymmetrical populations":
        with third moment κ, (g + κ/(6s²n) + κg²/(3s⁴))·√n/s is Student's, where g is the distance
        of the mean from its true value. Skewness in favour of the promise is ignored.
        """
        count, variance = slack.size, float(slack.var(ddof=1))
        if variance == 0:
            return float(slack.mean())
        third = min(0.0, float(((slack - slack.mean()) ** 3).mean()))
        half = t_quantile(1 - 2 * level, count - 1) * math.sqrt(variance / count)
        needed = half - third / (6 * variance * count)
        lean = 4 * third / (3 * variance**2) * needed
        return float(slack.mean()) - 2 * needed / (1 + math.sqrt(max(0.0, 1 + lean)))

    def gain(self, candidate: Samples, reference: Samples) -> float:
        """Return the accuracy of the candidate."""
        return candidate.accuracy
