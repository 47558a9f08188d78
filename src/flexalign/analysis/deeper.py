"""Whether λ < 0 pays, on given responses of the reference: what longer thinking gives, and the rest.

Let π_0 be the reference, π_1 the aligned model and π_λ their fusion (equation 5). The *score* of the
token y at a position is the derivative of log π_λ(y) at λ = 0,

    s = log π_1(y) − log π_0(y) − E_{π_0}[log π_1 − log π_0],

and for any figure f of a response that π_0 sampled, dE[f]/dλ = E[f · Σ s] (the likelihood ratio
method: Glynn 1990, "Likelihood ratio gradient estimation for stochastic systems"; Williams 1992,
REINFORCE). Nothing is sampled at another λ. Given the tokens before it, a score has mean zero.
Hence the length counts from each position on, a constant may be subtracted from f, and the sum over
any group of positions is that group's own part of the derivative.

A *decision of length* is a shift (one token gives way to another) whose part of the derivative of
the length is not zero beyond chance. Where the parts of all other positions in the accuracy are
zero, the pair differs in how long it thinks and in nothing else that matters.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flexalign.statistics import Interval, clustered_interval, simultaneous_interval

DEEPER_LAMBDA = -0.25
"""The λ below 0 of which the change is stated; the paper's λ < 0 that paid are −0.25 and −0.33."""

LARGEST_VARIATION = 0.5
"""The mean total variation above which nothing is decided: the two models would write another token
at most places, so that the derivative at λ = 0 says little of any other λ."""

_MOST_SHIFTS = 50
_FEWEST_POSITIONS = 20
"""The shifts that may be decisions of length: this many at most, each with this many positions."""

Verdict: TypeAlias = Literal["pays", "costs tokens only", "not decided"]
"""Whether λ < 0 pays. ``costs tokens only``: the accuracy does not rise, or what longer thinking gains
is lost at other tokens."""


@dataclass(frozen=True)
class LengthAndAccuracy:
    """The first-order change of a mean length and of an accuracy, with 95 % intervals.

    Attributes:
        tokens: Change of the mean tokens of a response.
        accuracy: Change of the share of right answers; None if the answers are not known.
    """

    tokens: Interval
    accuracy: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        accuracy = (
            {"accuracy": None, "accuracy_ci": None}
            if self.accuracy is None
            else self.accuracy.to_json("accuracy")
        )
        return self.tokens.to_json("tokens") | accuracy


@dataclass(frozen=True)
class DeeperThinking:
    """What a λ below 0 changes, to first order, on the reference's own responses.

    Attributes:
        lam: λ.
        tokens: Mean tokens of the responses.
        whole: The change.
        length: Its part at decisions of length.
        rest: Its part at all other tokens.
        variation: Mean total variation of the two models, over all tokens.
        share: Share of the models' total variation that lies at decisions of length, 0…1.
        decisions: The decisions of length as pairs (falls, rises), the most total variation first.
        responses: Number of the responses.
        available: Number of responses in the file that they are the first of; None if not known.
    """

    lam: float
    tokens: float
    whole: LengthAndAccuracy
    length: LengthAndAccuracy
    rest: LengthAndAccuracy
    variation: float
    share: float
    decisions: tuple[tuple[str, str], ...]
    responses: int
    available: int | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether λ < 0 pays, by the 95 % intervals of the accuracy."""
        if self.whole.accuracy is None or self.rest.accuracy is None:
            return "not decided"
        if self.variation > LARGEST_VARIATION:
            return "not decided"
        if self.whole.accuracy.low > 0:
            return "pays"
        if self.whole.accuracy.high < 0 or self.rest.accuracy.high < 0:
            return "costs tokens only"
        return "not decided"

    @property
    def sentence(self) -> str:
        """The figures and the verdict in one sentence."""
        # Where the two differ, and what that does to the tokens.
        named = ", ".join(f"{falls!r} → {rises!r}" for falls, rises in self.decisions[:3])
        more = len(self.decisions) - 3
        where = f" ({named}{f' and {more} more' if more > 0 else ''})" if named else ""
        parts = (
            f"λ = {self.lam:g} changes the tokens by {_interval(self.whole.tokens, '.1f')} of "
            f"{self.tokens:.1f}, to first order; {self.share:.0%} of the difference is at decisions "
            f"of length{where}"
        )

        # What it does to the accuracy, if that is known.
        whole, length, rest = (one.accuracy for one in (self.whole, self.length, self.rest))
        if whole is None or length is None or rest is None:
            return (
                f"{parts}. Whether that pays is not decided: not every response has a known answer."
            )

        points = (
            f"{parts}, which change the accuracy by {_points(length)} points, all other tokens by "
            f"{_points(rest)}, together {_points(whole)}: thinking deeper "
        )
        ends: dict[Verdict, str] = {
            "pays": "pays.",
            "costs tokens only": (
                "costs tokens only: what it gains in length is lost at other tokens."
                if rest.high < 0
                else "costs tokens only."
            ),
            "not decided": (
                "is not decided, as the two would write another token at "
                f"{self.variation:.0%} of the places, and first order does not reach so far."
                if self.variation > LARGEST_VARIATION
                else f"is not decided on {self._sample}."
            ),
        }
        return points + ends[self.verdict]

    @property
    def _sample(self) -> str:
        """The responses that were read, and how more are read."""
        if self.available is None or self.available <= self.responses:
            return f"all {self.responses:,} responses; sample more"
        return (
            f"{self.responses:,} of {self.available:,} responses; more decide it: "
            f"--limit {self.available}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name, with the verdict and its sentence."""
        return {
            "lambda": self.lam,
            "tokens": self.tokens,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "whole": self.whole.to_json(),
            "length": self.length.to_json(),
            "rest": self.rest.to_json(),
            "variation": self.variation,
            "share": self.share,
            "decisions": [list(pair) for pair in self.decisions],
        }


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens of responses as two models see them; each array has one value for each token.

    Attributes:
        row: Index of the token's response.
        left: Number of tokens of the response from this one on.
        score: The score (see the module's docstring).
        variation: Total variation of the two models.
        shift: The token's shift, a number from 0; −1 if the models do not differ there.
    """

    row: NDArray[np.int64]
    left: NDArray[np.int64]
    score: NDArray[np.float64]
    variation: NDArray[np.float64]
    shift: NDArray[np.int64]


def think_deeper(
    tokens: ScoredTokens,
    lengths: Sequence[int],
    questions: Sequence[Hashable],
    name: Callable[[int], tuple[str, str]],
    right: Sequence[bool] | None = None,
    available: int | None = None,
    lam: float = DEEPER_LAMBDA,
) -> DeeperThinking | None:
    """Predict what a λ near 0 changes, from responses that the reference sampled at temperature 1.

    Args:
        tokens: All response tokens.
        lengths: Tokens of each response.
        questions: The question of each response; intervals are clustered by it.
        name: Returns the two tokens of a shift, as text, from its number.
        right: Whether the answer of each response is right; None if that is not known.
        available: Number of responses in the file that these are the first of, if known.
        lam: λ.

    Returns:
        The change; None if the two models are equal on all responses, or the question is but one.
    """
    if len(set(questions)) < 2 or not tokens.variation.any():
        return None

    # Number −1, of no shift, is counted as 0 and left out.
    counts = np.bincount(tokens.shift + 1)[1:]
    order = np.argsort(-np.bincount(tokens.shift + 1, tokens.variation)[1:])
    tested = [int(shift) for shift in order if counts[shift] >= _FEWEST_POSITIONS][:_MOST_SHIFTS]
    decisions = []
    for shift in tested:
        parts = _length_parts(tokens, tokens.shift == shift, len(lengths))
        found = simultaneous_interval(parts, questions, len(tested), share=False)
        if found.low > 0 or found.high < 0:
            decisions.append(shift)

    at_decision = np.isin(tokens.shift, decisions)
    parts_of = {True: at_decision, False: ~at_decision}
    lengths_by = {key: _length_parts(tokens, mask, len(lengths)) for key, mask in parts_of.items()}
    accuracy_by = None
    if right is not None:
        gain = np.asarray(right, dtype=float)
        gain -= gain.mean()
        accuracy_by = {
            key: gain * np.bincount(tokens.row, tokens.score * mask, len(lengths))
            for key, mask in parts_of.items()
        }

    def change(*keys: bool) -> LengthAndAccuracy:
        tokens_changed = lam * sum(lengths_by[key] for key in keys)
        accuracy = None
        if accuracy_by is not None:
            changed = lam * sum(accuracy_by[key] for key in keys)
            accuracy = clustered_interval(changed, questions, share=False)
        return LengthAndAccuracy(
            clustered_interval(tokens_changed, questions, share=False), accuracy
        )

    return DeeperThinking(
        lam=lam,
        tokens=float(np.mean(lengths)),
        whole=change(True, False),
        length=change(True),
        rest=change(False),
        variation=float(tokens.variation.mean()),
        share=float(tokens.variation[at_decision].sum() / tokens.variation.sum()),
        decisions=tuple(map(name, decisions)),
        responses=len(lengths),
        available=available,
    )


def _length_parts(tokens: ScoredTokens, mask: NDArray[np.bool_], rows: int) -> NDArray[np.float64]:
    """Return what some positions add to the derivative of the length, for each response, (rows,)."""
    # The mean length that is left is subtracted, which takes nothing from the mean of the products.
    mean = tokens.left[mask].mean() if mask.any() else 0.0
    values = tokens.score * (tokens.left - mean) * mask
    return np.bincount(tokens.row, values, rows).astype(np.float64)


def _interval(found: Interval, form: str) -> str:
    return f"{found.mean:+{form}} [{found.low:+{form}}, {found.high:+{form}}]"


def _points(found: Interval) -> str:
    return _interval(Interval(*(100 * end for end in found)), ".1f")
