"""What a setting has to keep, and what it is chosen for among those that keep it.

A constraint turns samples into a *slack* for each question, whose mean is above 0 exactly where the
promise is kept, and into a *gain*, by which settings that keep it are compared.
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
    """A promise that a setting has to keep, and what is preferred among those that keep it."""

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
    def text(self) -> str:
        """The promise as a clause."""

    def slack(self, candidate: Samples, reference: Samples) -> NDArray[np.float64]:
        """Slack of each question, shape (n,).

        Args:
            candidate: Samples of the setting.
            reference: Samples of the reference on the same questions, in the same order.
        """

    def bound(self, slack: NDArray[np.float64], level: float) -> float:
        """Lower bound of the mean slack at one-sided error `level`, in (0, 0.5).

        Args:
            slack: One value a question, shape (n,), at least 2.
            level: One-sided error, in (0, 0.5).
        """

    def gain(self, candidate: Samples, reference: Samples) -> float:
        """What is to be large; a setting without positive gain is not worth choosing."""


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
    def text(self) -> str:
        """The promise as a clause."""
        return f"accuracy no more than {100 * self.margin:g} points below the reference's"

    def slack(self, candidate: Samples, reference: Samples) -> NDArray[np.float64]:
        """Difference of the shares of right answers, plus the margin."""
        right = candidate.by_question(candidate.correct)
        return right - reference.by_question(reference.correct) + self.margin

    def bound(self, slack: NDArray[np.float64], level: float) -> float:
        """Student's bound, with two corrections for losses of whole questions.

        The deviation is at least `least_deviation`, and half a question is taken off (Yates):
        without them, and with a score interval too, rare losses go unseen at early looks.
        """
        count = slack.size
        deviation = max(float(slack.std(ddof=1)), self.least_deviation)
        half = t_quantile(1 - 2 * level, count - 1) * deviation / math.sqrt(count)
        return float(slack.mean()) - half - 1 / (2 * count)

    def gain(self, candidate: Samples, reference: Samples) -> float:
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
    def text(self) -> str:
        """The promise as a clause."""
        return f"no more than {self.tokens:g} tokens a mean answer"

    def slack(self, candidate: Samples, reference: Samples) -> NDArray[np.float64]:
        """Budget less the question's mean tokens."""
        return self.tokens - candidate.by_question(candidate.tokens)

    def bound(self, slack: NDArray[np.float64], level: float) -> float:
        """Johnson's bound, as few long answers make the mean's distribution lean.

        Johnson 1978, "Modified t tests and confidence intervals for asymmetrical populations":
        with third moment κ, (g + κ/(6s²n) + κg²/(3s⁴))·√n/s is Student's, g the distance of the
        mean from its true value. A lean that would help the promise is not counted.
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
        """Accuracy."""
        return candidate.accuracy
