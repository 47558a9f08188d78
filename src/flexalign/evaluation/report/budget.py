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
from flexalign.evaluation.samples import Samples
from flexalign.statistics import (
    Interval,
    clustered_interval,
    paired_difference_interval,
)


def answered(samples: Samples, cap: int) -> NDArray[np.bool_]:
    """Which samples come to their answer within `cap` tokens, shape (n,)."""
    is_cut = samples.status == "truncated"  # by the sweep's own limit
    return np.asarray((samples.tokens <= cap) & (samples.correct | ~is_cut), dtype=np.bool_)


def spent(samples: Samples, cap: int) -> float:
    """Mean tokens a response under the cap."""
    return float(np.minimum(samples.tokens, cap).mean())


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


def score_by_budget(samples: Samples, caps: Sequence[int]) -> BudgetCurve:
    """Score one setting again at every cap (the module says what is assumed).

    Args:
        samples: Its samples on one task.
        caps: The limits on tokens, rising.

    Raises:
        DataError: If there are no samples.
    """
    in_time = [answered(samples, cap) for cap in caps]
    questions = samples.question.tolist()
    return BudgetCurve(
        caps=tuple(caps),
        accuracy=tuple(
            clustered_interval(within & samples.correct, questions, share=True)
            for within in in_time
        ),
        answered=tuple(float(within.mean()) for within in in_time),
        tokens=tuple(spent(samples, cap) for cap in caps),
    )


@dataclass(frozen=True)
class GainSplit:
    """What a difference in accuracy between two settings is made of, at one cap.

    Attributes:
        no_longer_cut: Part that comes from more (or fewer) responses reaching an answer.
        better_answers: Part that comes from the answers themselves.
    """

    no_longer_cut: float
    better_answers: float


def split_gain(curve: BudgetCurve, reference: BudgetCurve) -> tuple[GainSplit, ...]:
    """GainSplit the gain over the reference into "no longer cut" and "better answers", cap by cap.

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
        parts.append(GainSplit((f1 - f0) * (q0 + q1) / 2, (q1 - q0) * (f0 + f1) / 2))
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


def hard_budget(samples: Samples, reference: Samples) -> HardBudget | None:
    """Compare a setting with a hard limit on the reference that costs the same.

    Args:
        samples: The setting's samples.
        reference: The reference's samples on the same questions.

    Returns:
        The largest cap under which the reference spends no more than the setting does. None
        where the setting spends at least as much as the reference without a cap, less than it
        would with a cap of 1, or where the two answered different questions.
    """
    spend = samples.mean_tokens
    longest = int(reference.tokens.max())
    if set(samples.questions) != set(reference.questions):
        return None
    if spend >= spent(reference, longest) or spend < spent(reference, 1):
        return None

    # What the reference spends rises with the cap, so that the cap is found by bisection.
    cap = bisect_right(range(longest), spend, lo=1, key=lambda cap: spent(reference, cap)) - 1
    right = answered(reference, cap) & reference.correct
    return HardBudget(
        cap=cap,
        tokens=spent(reference, cap),
        accuracy=float(right.mean()),
        advantage=paired_difference_interval(
            samples.correct,
            samples.question.tolist(),
            right,
            reference.question.tolist(),
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
