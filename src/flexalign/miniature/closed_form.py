"""Exact results of equation 5, and of the optimum that it approximates, in the small world.

**Token level (equation 5).** Each habit is decided at one token, between an event of probability
p and its absence. Fusion mixes the logits of the two linearly, so

    logit p(λ) = λ·logit p_aligned + (1−λ)·logit p_reference

(the two wrong tokens of an error have a common factor, so the same is true of `error`). The gate
acts on each branch separately, because the total variation of a branch is |p_aligned −
p_reference|.

**Sequence level.** The optimum that equation 5 approximates, π_ref^(1−λ)·π_aligned^λ normalised
over whole traces, multiplies weights ``w(p) = p_ref^(1−λ)·p_al^λ`` along a trace. A trace is a
path through a small automaton, so the sums are geometric series. Let R and S be the weights of
another pass and of no further pass. The sum over one or more passes is G = S/(1−R), which exists
if R < 1, and the share of passes that are followed by another one is R·G/(S+R·G) = R:

    r* = r_ref^(1−λ)·r_al^λ,    c* = C·G / (C·G + C̄),    ε* = E / (E + Ē),

where C and C̄ are the weights of checking and of not checking, E and Ē those of a wrong and of a
right line. After a wrong line the sum G is the same as after a right one (``catch`` is equal in
both models, so the outcomes of a pass sum to one); hence ε* is that of the token level. A whole
line sums to Z = (E+Ē)(C·G+C̄), and if k lines follow when the trace does not give up

    quit*_k = U / (U + Ū·Z_k),   Z_1 = Z,   Z_k = Z·(U + Ū·Z_{k−1}).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flexalign.errors import ConfigError
from flexalign.miniature.world import (
    END_TOKENS,
    FRAME_TOKENS,
    LARGEST_TERM,
    LINE_TOKENS,
    PASS_TOKENS,
    TERMS,
    Habits,
)


@dataclass(frozen=True)
class HabitsOutcome:
    """Accuracy and tokens of given habits, over all questions.

    Attributes:
        accuracy: Share of right answers, 0…1.
        tokens: Mean tokens of a response, without the end-of-sequence token.
    """

    accuracy: float
    tokens: float


def token_level(
    reference: Habits, aligned: Habits, lam: float, gate: float | None = None
) -> Habits:
    """Return the habits of the model of equation 5 at λ (see the module's docstring).

    Args:
        reference: The habits of λ = 0.
        aligned: The habits of λ = 1.
        lam: λ.
        gate: The gate τ; None for no gate.
    """

    def fused(habit: str) -> float:
        low, high = getattr(reference, habit), getattr(aligned, habit)
        used = _gated(low, high, lam, gate)
        return _logistic(used * _logit(high) + (1 - used) * _logit(low))

    return Habits(**{field.name: fused(field.name) for field in fields(Habits)})


def sequence_level(
    reference: Habits, aligned: Habits, lam: float, gate: float | None = None
) -> tuple[Habits, list[float]]:
    """Return the habits of the sequence-level optimum π_ref^(1−λ)·π_aligned^λ.

    Args:
        reference: The habits of λ = 0.
        aligned: The habits of λ = 1.
        lam: λ.
        gate: The gate τ: for a habit that differs by at most τ, λ is limited to [0, 1].

    Returns:
        The habits, with `quit` before the last line; and `quit` by the number k = 1, 2, … of
        lines still to come, the only habit that depends on the position in the trace.

    Raises:
        ConfigError: If the optimum does not exist (R ≥ 1: the weights of longer and longer traces
            do not decrease), or if the two models differ in `catch`.
    """
    if reference.catch != aligned.catch:
        raise ConfigError("the closed form wants the same `catch` in both models.")

    def both(habit: str) -> tuple[float, float]:
        low, high = getattr(reference, habit), getattr(aligned, habit)
        used = _gated(low, high, lam, gate)

        def weight(low: float, high: float) -> float:
            return math.exp((1 - used) * math.log(low) + used * math.log(high))

        return weight(low, high), weight(1 - low, 1 - high)

    again, stop = both("again")
    if again >= 1:
        raise ConfigError(
            f"no sequence-level optimum at λ={lam:g}: another pass would weigh {again:.3f} ≥ 1, "
            "so ever longer traces would weigh ever more."
        )

    passes = stop / (1 - again)
    check, no_check = both("check")
    error, no_error = both("error")
    quits, continues = both("quit")

    line = (error + no_error) * (check * passes + no_check)
    ahead, quit_by_lines = line, []
    for _ in range(max(TERMS) - 2):
        quit_by_lines.append(quits / (quits + continues * ahead))
        ahead = line * (quits + continues * ahead)

    habits = Habits(
        error=error / (error + no_error),
        check=check * passes / (check * passes + no_check),
        again=again,
        catch=reference.catch,
        quit=quit_by_lines[0],
    )
    return habits, quit_by_lines


def expected_outcome(habits: Habits, quit_by_lines: Sequence[float] | None = None) -> HabitsOutcome:
    """Compute the exact accuracy and mean tokens over all questions.

    Args:
        habits: The habits.
        quit_by_lines: `quit` by the number of lines still to come; if not given, `habits.quit`.
    """
    # A line remains wrong if it was written wrong and no pass corrected it.
    missed = (1 - habits.catch) * (1 - habits.again) / (1 - habits.again * (1 - habits.catch))
    wrong = habits.error * ((1 - habits.check) + habits.check * missed)
    line_tokens = LINE_TOKENS + END_TOKENS + PASS_TOKENS * habits.check / (1 - habits.again)
    accuracy = tokens = 0.0
    for terms in TERMS:
        lines = terms - 1
        reached = 1.0
        for done in range(1, lines + 1):
            left = lines - done
            tokens += reached * line_tokens / len(TERMS)
            leaves = 1.0 if left == 0 else _quit(habits, quit_by_lines, left)
            right = float(_deviation(done, wrong) @ _missing(left, done))
            accuracy += reached * leaves * right / len(TERMS)
            reached *= 1 - leaves
    return HabitsOutcome(accuracy, FRAME_TOKENS + tokens)


def sequence_level_outcome(
    reference: Habits, aligned: Habits, lam: float, gate: float | None = None
) -> HabitsOutcome:
    """Compute accuracy and mean tokens of the sequence-level optimum.

    Raises:
        ConfigError: As `sequence_level` does.
    """
    habits, quit_by_lines = sequence_level(reference, aligned, lam, gate)
    return expected_outcome(habits, quit_by_lines)


def _quit(habits: Habits, quit_by_lines: Sequence[float] | None, left: int) -> float:
    return habits.quit if quit_by_lines is None else quit_by_lines[left - 1]


def _deviation(lines: int, wrong: float) -> NDArray[np.float64]:
    """Return the distribution of the summed deviation −lines…lines, of lines wrong by ±1 each.

    Args:
        lines: Number of lines.
        wrong: Probability that a line is wrong.
    """
    one = np.array([wrong / 2, 1 - wrong, wrong / 2])
    total = np.array([1.0])
    for _ in range(lines):
        total = np.convolve(total, one)
    return total


@lru_cache
def _missing(left: int, lines: int) -> NDArray[np.float64]:
    """Return the probability that `left` numbers sum to each of the deviations −lines…lines.

    If the trace gives up, the answer is still right if the deviation equals this sum.
    """
    total = np.array([1.0])
    for _ in range(left):
        total = np.convolve(total, np.array([0.0] + [1 / LARGEST_TERM] * LARGEST_TERM))
    chances = np.zeros(2 * lines + 1)
    reach = min(lines, len(total) - 1)
    chances[lines : lines + reach + 1] = total[: reach + 1]
    return chances


def _gated(low: float, high: float, lam: float, gate: float | None) -> float:
    """Return λ, limited to [0, 1] if the two probabilities differ by at most the gate."""
    if gate is not None and abs(high - low) <= gate:
        return min(max(lam, 0.0), 1.0)
    return lam


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
