"""Verifying a finalist on held-out questions, in as few looks as it takes."""

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
"""Proved; given up as the rest would hardly prove it; not proved when the questions ended."""

_FUTILE = 0.05
"""A proof that is less probable than this is given up."""


@dataclass(frozen=True)
class Evidence:
    """A setting beside the reference on the same questions; intervals are at 95 %.

    Attributes:
        candidate: Samples of the setting.
        reference: Samples of the reference.
    """

    candidate: Samples
    reference: Samples

    @property
    def questions(self) -> int:
        """How many."""
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
        """Difference of the two, paired by question."""
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
        """Return plain values; an interval is low, estimate, high."""
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
        questions: Held-out questions so far.
        slack: Estimate of the mean slack.
        strength: What is held against the threshold: the bound of the slack, or the wealth.
        threshold: 0 for a bound, 1/α for a wealth.
    """

    questions: int
    slack: float
    strength: float
    threshold: float


@dataclass(frozen=True)
class Proof:
    """How a finalist fared.

    Attributes:
        setting: Its id.
        verdict: How it ended.
        looks: Each look.
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
    """Ask held-out questions until the promise is proved or is not worth pursuing.

    Giving up early takes nothing from the error, so it needs no share of it.

    Args:
        setting: The finalist.
        reference: What it is compared with.
        ledger: Asks the questions.
        questions: Held out, in order.
        constraint: What has to be proved.
        alpha: One-sided error of the whole proof.
        looks: How it is shared.
        count: How many looks at most.
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
    """Questions at each look: even steps of at least 10, the last one all of them."""
    count = max(1, min(count, questions // 10))
    return [round(questions * (step + 1) / count) for step in range(count)]
