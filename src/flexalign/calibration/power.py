"""Computes what given numbers of questions and samples can prove, before anything is sampled.

The paired difference d of one question, a mean over k samples of each setting, has the variance

    Var d = between + within / k

where *between* is the variance over questions of the true difference, and *within* the variance of
correct(candidate) − correct(reference) for one pair of samples of one question. With n questions,
a candidate as good as the reference is proved no worse than a margin m below it, at one-sided
error α and with probability `power`, if

    m ≥ (t_{1−α, n−1} + z_power) · √(Var d / n)

(the usual size of a non-inferiority trial). More samples only reduce the part *within*.
"""

import math
from dataclasses import dataclass
from typing import Any

from scipy.optimize import brentq
from scipy.special import ndtri

from flexalign.calibration.constraints import Constraint, NonInferiority
from flexalign.calibration.results import REFERENCE, StoredSamples
from flexalign.errors import ConfigError, DataError
from flexalign.evaluation.samples import Samples
from flexalign.models.names import known_name
from flexalign.statistics import t_quantile

TASK_ACCURACY = {
    "math500": 0.82,
    "gsm8k": 0.85,
    "amc": 0.8,
    "aime": 0.5,
    "aime25": 0.4,
}
"""Assumed accuracies by task if none is given, about those of a 7B reasoning model."""

_ALIKE = 0.6
_SHIFT = 0.07
_MOST = 10**7
_SMALLER = (0.75, 0.5, 0.25)


def expected_accuracy(task: str) -> float:
    """Return the assumed accuracy on a task: the known one, else 0.5, the worst case."""
    known = known_name(task)
    if known is not None and known[0].accuracy is not None:
        return known[0].accuracy
    return TASK_ACCURACY.get(task, 0.5)


@dataclass(frozen=True)
class VarianceModel:
    """The variance of a question's paired difference, in two parts.

    Attributes:
        between: Variance over questions of the true difference.
        within: Variance of the difference of one pair of samples, within a question.
    """

    between: float
    within: float

    @classmethod
    def assumed(
        cls, accuracy: float = 0.5, *, alike: float = _ALIKE, shift: float = _SHIFT
    ) -> "VarianceModel":
        """Assume the variances from an accuracy.

        Of a single answer's variance p(1 − p), the share `alike` is between questions (0.6: most
        questions are answered right nearly always or nearly never). *Within* is twice the rest.

        Args:
            accuracy: Expected share of right answers; 0.5 is the worst case.
            alike: Intraclass correlation of the samples of a question, in [0, 1].
            shift: Standard deviation over questions of the true difference.

        Raises:
            ConfigError: If an argument is out of its range.
        """
        if not 0 <= accuracy <= 1 or not 0 <= alike <= 1 or not shift >= 0:
            raise ConfigError(
                "accuracy and alike must be in [0, 1] and shift at least 0, got "
                f"{accuracy}, {alike}, {shift}."
            )
        return cls(shift**2, 2 * (1 - alike) * accuracy * (1 - accuracy))

    @classmethod
    def measured(cls, candidate: Samples, reference: Samples) -> "VarianceModel":
        """Estimate the variances from a pilot, by moments; includes the effect of common seeds.

        Args:
            candidate: Samples of a setting, at least 2 questions with 2 samples each.
            reference: As many samples of λ = 0, on the same questions in the same order.

        Raises:
            DataError: If the pilot is too small, or the two differ in shape.
        """
        if candidate.shape != reference.shape or min(candidate.shape) < 2:
            raise DataError(
                "a pilot needs at least 2 questions of 2 samples, the same for both settings; got "
                f"{candidate.shape} and {reference.shape}."
            )
        right = candidate.table(candidate.correct).astype(float)
        pairs = right - reference.table(reference.correct)
        within = float(pairs.var(1, ddof=1).mean())
        between = float(pairs.mean(1).var(ddof=1)) - within / pairs.shape[1]
        return cls(max(between, 0.0), within)

    def of_question(self, samples: int) -> float:
        """Return the variance of one question's difference, for `samples` of each setting."""
        return self.between + self.within / samples


def assumed_variance(task: str, accuracy: float | None = None) -> VarianceModel:
    """Return the assumed variance of a task, before anything is sampled.

    Args:
        task: The task's name.
        accuracy: The expected accuracy; if not given, :func:`expected_accuracy`.
    """
    return VarianceModel.assumed(expected_accuracy(task) if accuracy is None else accuracy)


def measured_variance(stored: StoredSamples) -> VarianceModel:
    """Return the variance of stored samples, of the setting with the largest one against λ = 0.

    Raises:
        ConfigError: If λ = 0 or a candidate is missing.
        DataError: If there are fewer than 2 questions with 2 samples each.
    """
    others = [setting for setting in stored.settings if setting != REFERENCE]
    if not others or REFERENCE not in stored.settings:
        raise ConfigError("the stored samples need λ=0 and a candidate; sweep both.")
    each = stored.samples
    reference, *measured = [
        stored.ask(setting, stored.questions, each) for setting in [REFERENCE, *others]
    ]
    models = [VarianceModel.measured(candidate, reference) for candidate in measured]
    return max(models, key=lambda model: model.of_question(each))


@dataclass(frozen=True)
class ProofCost:
    """The number of questions, or of samples, that is needed to prove a margin.

    Attributes:
        margin: The margin.
        questions: Questions needed with the given samples; None beyond ten million.
        samples: Samples needed with the given questions; None if no number suffices.
    """

    margin: float
    questions: int | None
    samples: int | None


@dataclass(frozen=True)
class ProofPlan:
    """The smallest margin that can be proved, and the cost of smaller ones.

    Attributes:
        questions: Number of questions.
        samples: Samples of each question for each of the two settings.
        confidence: One-sided confidence of the proof.
        power: Probability of the proof if the candidate is as good as the reference.
        margin: Smallest margin for one setting that is chosen beforehand, on all questions.
        tune_margin: Smallest margin on the questions that `tune` holds out if the race uses its
            whole share; None if those are too few.
        costs: The cost of smaller margins, on all questions.
        variance: The variance model.
    """

    questions: int
    samples: int
    confidence: float
    power: float
    margin: float
    tune_margin: float | None
    costs: tuple[ProofCost, ...]
    variance: VarianceModel

    def is_proved(self, margin: float) -> bool:
        """Whether `tune` proves a margin, with probability `power`, if both are equally good."""
        return self.tune_margin is not None and margin >= self.tune_margin

    def verdict(self, constraint: Constraint) -> tuple[float | None, bool | None]:
        """Return the margin of a constraint, and whether `tune` mostly proves it.

        Returns:
            Two None for a constraint without a margin, about which the plan says nothing.
        """
        if not isinstance(constraint, NonInferiority):
            return None, None
        return constraint.margin, self.is_proved(constraint.margin)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "questions": self.questions,
            "samples": self.samples,
            "confidence": self.confidence,
            "power": self.power,
            "margin": self.margin,
            "tune_margin": self.tune_margin,
            "costs": [vars(cost) for cost in self.costs],
            "variance": vars(self.variance),
        }


def plan(
    questions: int,
    samples: int,
    *,
    confidence: float = 0.95,
    power: float = 0.8,
    variance: VarianceModel | None = None,
    choosing_share: float = 0.3,
    margins: tuple[float, ...] = (),
) -> ProofPlan:
    """Compute the smallest margin that can be proved, and the cost of smaller ones.

    Args:
        questions: Number of questions, at least 2.
        samples: Samples of each question for each setting, at least 1.
        confidence: One-sided confidence of the proof, in (0.5, 1).
        power: Probability of the proof if candidate and reference are equally good, in (0, 1).
        variance: The variance model; if not given, the one for accuracy 0.5, the worst case.
        choosing_share: Share of the questions that `tune` uses for its race.
        margins: Margins whose cost is computed, in (0, 1); if not given, three fractions of the
            smallest margin that can be proved.

    Raises:
        ConfigError: If an argument is out of its range.
    """
    if questions < 2 or samples < 1:
        raise ConfigError(
            f"a plan needs at least 2 questions and 1 sample, got {questions} and {samples}."
        )
    if not 0.5 < confidence < 1 or not 0 < power < 1:
        raise ConfigError(
            f"confidence must be in (0.5, 1) and power in (0, 1), got {confidence} and {power}."
        )
    if any(not 0 < margin < 1 for margin in margins):
        raise ConfigError(f"margins must be between 0 and 1, got {margins}.")

    model = variance or VarianceModel.assumed()

    def provable(count: int, per_question: int) -> float:
        return _factor(count, confidence, power) * math.sqrt(
            model.of_question(per_question) / count
        )

    margin = provable(questions, samples)
    held_out = questions - round(choosing_share * questions)
    return ProofPlan(
        questions,
        samples,
        confidence,
        power,
        margin,
        _tune_margin(held_out, confidence, power, model.of_question(samples)),
        tuple(
            _cost(wanted, questions, samples, confidence, power, model)
            for wanted in margins or tuple(share * margin for share in _SMALLER if margin > 0)
        ),
        model,
    )


def _factor(questions: int, confidence: float, power: float) -> float:
    return t_quantile(2 * confidence - 1, questions - 1) + float(ndtri(power))


def _tune_margin(questions: int, confidence: float, power: float, variance: float) -> float | None:
    """Return the smallest margin that `NonInferiority.bound` proves in a single look.

    The cost of several looks is small, and is not included.
    """
    if questions < 2:
        return None
    against = t_quantile(2 * confidence - 1, questions - 1) / math.sqrt(questions)
    chance = float(ndtri(power)) * math.sqrt(variance / questions)

    def lacking(margin: float) -> float:
        least = NonInferiority(margin).least_deviation if 0 < margin < 1 else 0.0
        needed = against * max(math.sqrt(variance), least) + chance + 1 / (2 * questions)
        return needed - margin

    return float(brentq(lacking, 0.0, 1.0, xtol=1e-12)) if lacking(1.0) < 0 else 1.0


def _cost(
    margin: float,
    questions: int,
    samples: int,
    confidence: float,
    power: float,
    model: VarianceModel,
) -> ProofCost:
    factor = float(ndtri(confidence) + ndtri(power))
    variance = model.of_question(samples)
    needed = max(2, math.ceil(variance * (factor / margin) ** 2))
    if needed <= _MOST and needed < 1000:  # for few questions, Student's t needs a few more
        while _factor(needed, confidence, power) * math.sqrt(variance / needed) > margin:
            needed += 1

    # 1e-9 less, so that rounding does not add a sample to an exact quotient.
    room = questions * (margin / _factor(questions, confidence, power)) ** 2 - model.between
    more = math.ceil(model.within / room - 1e-9) if room > 0 else None
    return ProofCost(
        margin,
        needed if needed <= _MOST else None,
        max(1, more) if more is not None and more <= _MOST else None,
    )
