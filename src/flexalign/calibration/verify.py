"""Verifies a finalist on held-out questions, in several looks that may end early."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from flexalign.calibration.constraints import Constraint
from flexalign.calibration.race import steadied_deviation
from flexalign.calibration.results import Ledger
from flexalign.calibration.sequential import Looks, betting_wealth, look_levels, predictive_power
from flexalign.evaluation.samples import Samples
from flexalign.statistics import Interval

Verdict: TypeAlias = Literal["kept", "futile", "open"]
"""Proved; given up, as the remaining questions would hardly prove it; or not proved at the end."""

_FUTILE = 0.05
"""Verification is given up if the proof is less probable than this."""


@dataclass(frozen=True)
class Evidence:
    """The figures of a setting and of the reference on the same questions, with 95 % intervals.

    Attributes:
        candidate: Samples of the setting.
        reference: Samples of the reference.
    """

    candidate: Samples
    reference: Samples

    @property
    def questions(self) -> int:
        """Number of questions."""
        return len(self.candidate.questions)

    @property
    def accuracy(self) -> Interval:
        """Share of the setting's answers that are right."""
        return self.candidate.accuracy_interval()

    @property
    def reference_accuracy(self) -> Interval:
        """Share of the reference's answers that are right."""
        return self.reference.accuracy_interval()

    @property
    def difference(self) -> Interval:
        """Accuracy minus that of the reference, paired by question."""
        return self.candidate.accuracy_difference(self.reference)

    @property
    def tokens(self) -> Interval:
        """Mean tokens of the setting's answers."""
        return self.candidate.tokens_interval()

    @property
    def reference_tokens(self) -> Interval:
        """Mean tokens of the reference's answers."""
        return self.reference.tokens_interval()

    @property
    def token_cut(self) -> float:
        """Share of the reference's tokens that is saved."""
        return 1 - self.candidate.mean_tokens / self.reference.mean_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; an interval is low, estimate, high."""
        return {
            "questions": self.questions,
            "accuracy": list(self.accuracy),
            "reference_accuracy": list(self.reference_accuracy),
            "difference": list(self.difference),
            "tokens": list(self.tokens),
            "reference_tokens": list(self.reference_tokens),
            "token_cut": self.token_cut,
        }


@dataclass(frozen=True)
class Look:
    """One look at the evidence.

    Attributes:
        questions: Number of held-out questions so far.
        slack: Estimate of the mean slack.
        strength: The lower bound of the mean slack, or the wealth of a bet.
        threshold: The value that `strength` must exceed: 0 for a bound, 1/α for a wealth.
    """

    questions: int
    slack: float
    strength: float
    threshold: float


@dataclass(frozen=True)
class Proof:
    """The result of verifying a finalist.

    Attributes:
        setting: The setting's id.
        verdict: The verdict after the last look.
        looks: All looks, in order.
    """

    setting: str
    verdict: Verdict
    looks: tuple[Look, ...]


def verify(
    setting: str,
    reference: str,
    ledger: Ledger,
    questions: Sequence[str],
    constraint: Constraint,
    alpha: float,
    looks: Looks,
    count: int,
) -> Proof:
    """Ask held-out questions until the promise is proved, or a proof becomes improbable.

    Giving up early cannot prove a false promise, so it uses no share of the error.

    Args:
        setting: Id of the finalist.
        reference: Id of the setting that it is compared with.
        ledger: The ledger, which asks the questions.
        questions: The held-out questions, in order.
        constraint: The constraint to prove.
        alpha: One-sided error of the whole proof.
        looks: How the error is divided among the looks.
        count: Largest number of looks.
    """
    ends = _ends(len(questions), count)
    fractions = tuple(end / len(questions) for end in ends)
    betting = looks == "betting"
    levels = (alpha,) * len(ends) if betting else look_levels(fractions, alpha, looks)

    seen: list[Look] = []
    for end, fraction, level in zip(ends, fractions, levels, strict=True):
        base = ledger.samples(reference, questions[:end])
        samples = ledger.samples(setting, questions[:end])
        slack = constraint.slack(samples, base)

        if betting:
            look = Look(
                end, float(slack.mean()), betting_wealth(slack, constraint.lowest), 1 / alpha
            )
        else:
            look = Look(end, float(slack.mean()), constraint.bound(slack, level), 0.0)
        seen.append(look)
        if look.strength > look.threshold:
            return Proof(setting, "kept", tuple(seen))

        deviation = max(steadied_deviation(slack, constraint.unit), constraint.least_deviation)
        score = look.slack * math.sqrt(end) / deviation
        if fraction < 1 and predictive_power(score, fraction, levels[-1]) < _FUTILE:
            return Proof(setting, "futile", tuple(seen))
    return Proof(setting, "open", tuple(seen))


def _ends(questions: int, count: int) -> list[int]:
    """Return the number of questions at each look: even steps of at least 10, up to all of them."""
    count = max(1, min(count, questions // 10))
    return [round(questions * (step + 1) / count) for step in range(count)]
