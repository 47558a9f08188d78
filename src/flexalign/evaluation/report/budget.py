"""Accuracy by budget: every sample of a sweep scored again as if it had been cut earlier.

A lower limit on tokens does not change how a response begins, so one sweep tells what every lower
limit would have given. Assumed, and nothing else: the model does not know its limit, and a
response that has not come to its answer within the limit is wrong (no answer is forced out of it).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexalign.errors import DataError
from flexalign.statistics import (
    Interval,
    clustered_interval,
    paired_difference_interval,
)


@dataclass(frozen=True)
class Scored:
    """The samples of one setting on one task, each array of shape (n,).

    Attributes:
        tokens: Length of each response.
        correct: Whether its answer is right.
        cut: Whether the sweep's own limit cut it before an answer.
        questions: The question of each.
    """

    tokens: NDArray[np.int64]
    correct: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    questions: Sequence[str]

    def __post_init__(self) -> None:
        """Check that the arrays belong together."""
        sizes = {self.tokens.size, self.correct.size, self.cut.size, len(self.questions)}
        if sizes in ({0}, set()) or len(sizes) != 1:
            raise DataError(f"samples need one value of each kind, at least one; got {sizes}.")

    def answered(self, cap: int) -> NDArray[np.bool_]:
        """Which samples come to their answer within `cap` tokens."""
        return (self.tokens <= cap) & (self.correct | ~self.cut)

    def spent(self, cap: int) -> float:
        """Mean tokens a response under the cap."""
        return float(np.minimum(self.tokens, cap).mean())


@dataclass(frozen=True)
class BudgetCurve:
    """One setting at every cap.

    Attributes:
        caps: The limits on tokens, rising.
        accuracy: Share of all samples that are right within the cap, with its interval.
        answered: Share of all samples that come to an answer within the cap.
        tokens: Mean of min(tokens, cap).
    """

    caps: tuple[int, ...]
    accuracy: tuple[Interval, ...]
    answered: tuple[float, ...]
    tokens: tuple[float, ...]

    def among_answered(self, index: int) -> float | None:
        """Accuracy of those that come to an answer within cap number `index`; None if none do."""
        share = self.answered[index]
        return self.accuracy[index].mean / share if share else None


def budget_caps(longest: int, shortest: int = 1, count: int = 28) -> tuple[int, ...]:
    """Caps between two lengths, evenly spaced in their logarithm.

    Args:
        longest: The last cap: the sweep's own limit, or its longest response.
        shortest: The first cap.
        count: How many at most; fewer where rounding makes some alike.
    """
    low, high = max(1, min(shortest, longest)), max(1, longest)
    caps = {_round(cap) for cap in np.geomspace(low, high, count)[:-1]}
    return (*sorted(cap for cap in caps if cap < high), high)


def score_by_budget(scored: Scored, caps: Sequence[int]) -> BudgetCurve:
    """Score one setting again at every cap (the module says what is assumed).

    Raises:
        DataError: If there are no samples.
    """
    answered = [scored.answered(cap) for cap in caps]
    return BudgetCurve(
        caps=tuple(caps),
        accuracy=tuple(
            clustered_interval(within & scored.correct, scored.questions, share=True)
            for within in answered
        ),
        answered=tuple(float(within.mean()) for within in answered),
        tokens=tuple(scored.spent(cap) for cap in caps),
    )


@dataclass(frozen=True)
class Split:
    """What a difference in accuracy between two settings is made of, at one cap.

    Attributes:
        no_longer_cut: Part that comes from more (or fewer) responses reaching an answer.
        better_answers: Part that comes from the answers themselves.
    """

    no_longer_cut: float
    better_answers: float


def split_gain(curve: BudgetCurve, reference: BudgetCurve) -> tuple[Split, ...]:
    """Split the gain over the reference into "no longer cut" and "better answers", cap by cap.

    With f the share that reaches an answer and q the accuracy among those, accuracy is f·q, and

        f₁q₁ − f₀q₀ = (f₁ − f₀)·(q₀ + q₁)/2 + (q₁ − q₀)·(f₀ + f₁)/2

    (Kitagawa 1955, "Components of a difference between two rates"). Where one of the two never
    reaches an answer its q is unknown and taken as the other's, so that the whole gain counts as
    "no longer cut".

    Raises:
        DataError: If the two curves have different caps.
    """
    if curve.caps != reference.caps:
        raise DataError("the two curves have different caps; score both at the same ones.")
    parts = []
    for index in range(len(curve.caps)):
        f0, f1 = reference.answered[index], curve.answered[index]
        q0, q1 = reference.among_answered(index), curve.among_answered(index)
        q0, q1 = _known(q0, q1), _known(q1, q0)
        parts.append(Split((f1 - f0) * (q0 + q1) / 2, (q1 - q0) * (f0 + f1) / 2))
    return tuple(parts)


@dataclass(frozen=True)
class HardBudget:
    """The reference under the cap at which it spends what another setting spends.

    Attributes:
        cap: That cap, in tokens.
        tokens: What the reference then spends in the mean.
        accuracy: What it then reaches.
        advantage: Accuracy of the setting less that of the capped reference, paired by question.
            The cap is taken as given: its own uncertainty is not in the interval.
    """

    cap: int
    tokens: float
    accuracy: float
    advantage: Interval


def hard_budget(scored: Scored, reference: Scored) -> HardBudget | None:
    """Hold a setting against a hard limit on the reference that costs the same.

    Args:
        scored: The setting's samples.
        reference: The reference's samples on the same questions.

    Returns:
        The largest cap under which the reference spends no more than the setting does. None
        where the setting spends at least as much as the reference without a cap, less than it
        would with a cap of 1, or where the two answered different questions.
    """
    spend = float(scored.tokens.mean())
    longest = int(reference.tokens.max())
    if set(scored.questions) != set(reference.questions):
        return None
    if spend >= reference.spent(longest) or spend < reference.spent(1):
        return None
    cap = bisect_right(range(longest), spend, lo=1, key=reference.spent) - 1
    right = reference.answered(cap) & reference.correct
    return HardBudget(
        cap=cap,
        tokens=reference.spent(cap),
        accuracy=float(right.mean()),
        advantage=paired_difference_interval(
            scored.correct, scored.questions, right, reference.questions
        ),
    )


def _round(cap: float) -> int:
    """To two leading digits, as a person would set a limit."""
    unit: int = 10 ** max(0, len(str(int(cap))) - 2)
    return max(1, round(cap / unit) * unit)


def _known(value: float | None, other: float | None) -> float:
    if value is not None:
        return value
    return other if other is not None else 0.0
