"""The race: narrowing the candidates down, on questions that prove nothing later.

Every setting still in the race answers the next few questions. The worth of a candidate is its gain
times the probability that the held-out questions will prove it. A candidate leaves when its worth,
estimated one standard error above what its answers show, is below that of the best candidate,
estimated one standard error below.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from flexalign.calibration.constraints import Constraint
from flexalign.calibration.results import Ledger
from flexalign.evaluation.samples import Samples

_HOPELESS = 0.05
"""A candidate whose proof is no more probable than this is left out."""

_SURE = 0.9
"""A proof that is at least as probable as this needs no safer finalist before it."""

_BATCHES = 5
"""Most steps of the race."""

_FEWEST = 8
"""Fewest questions in a step."""


@dataclass(frozen=True)
class Standing:
    """A candidate when it left the race, or at its end.

    Attributes:
        setting: Its id.
        questions: Questions it answered.
        promise: Probability that the held-out questions will prove it, judged by these.
        gain: Its gain.
    """

    setting: str
    questions: int
    promise: float
    gain: float

    @property
    def worth(self) -> float:
        """Expected gain."""
        return self.promise * self.gain


@dataclass(frozen=True)
class Race:
    """What the race came to.

    Attributes:
        finalists: To be verified, safest first; empty if none has a chance.
        standings: All candidates, in their own order.
        questions: The questions used.
    """

    finalists: tuple[str, ...]
    standings: tuple[Standing, ...]
    questions: tuple[str, ...]


def steadied_deviation(slack: NDArray[np.float64], unit: float) -> float:
    """Standard deviation of the slack over questions.

    As if one more question had been half a unit away from the mean, so that a few questions
    without any difference do not pass for certainty.

    Args:
        slack: One value a question, shape (n,), at least 2.
        unit: The size of a large difference.
    """
    squares = float(((slack - slack.mean()) ** 2).sum()) + unit**2 / 4
    return math.sqrt(squares / (slack.size - 1))


def race(
    candidates: Sequence[str],
    reference: str,
    ledger: Ledger,
    questions: Sequence[str],
    held_out: int,
    constraint: Constraint,
    level: float,
    finalists: int,
) -> Race:
    """Race the candidates.

    Args:
        candidates: Their ids.
        reference: The id of what they are compared with.
        ledger: Asks the questions.
        questions: At most these are used, in order.
        held_out: How many further questions there are for the proof.
        constraint: What has to be kept.
        level: One-sided error of the proof.
        finalists: How many may go on.
    """
    racing = list(candidates)
    left: dict[str, Standing] = {}
    size = max(_FEWEST, math.ceil(len(questions) / _BATCHES))
    used = 0

    # With one candidate left there is nothing to choose between, and further questions are saved
    # for the proof.
    while racing and used < len(questions) and (used == 0 or len(racing) > 1):
        used = min(used + size, len(questions))
        rest = held_out + len(questions) - used

        base = ledger.samples(reference, questions[:used])
        read = {
            setting: _read(
                setting, ledger.samples(setting, questions[:used]), base, constraint, rest, level
            )
            for setting in racing
        }
        left.update({setting: reading[1] for setting, reading in read.items()})

        bar = max(reading[0] for reading in read.values())
        racing = [
            setting
            for setting in racing
            if read[setting][1].gain > 0
            and read[setting][2].promise > _HOPELESS
            and read[setting][2].worth >= bar
        ]

    standings = tuple(left[setting] for setting in candidates)
    return Race(_finalists(standings, finalists), standings, tuple(questions[:used]))


def _read(
    setting: str,
    samples: Samples,
    base: Samples,
    constraint: Constraint,
    rest: int,
    level: float,
) -> tuple[float, Standing, Standing]:
    """The worth one standard error below the estimate, the standing at it, and the one above it."""
    slack = constraint.slack(samples, base)
    deviation = steadied_deviation(slack, constraint.unit)
    error = deviation / math.sqrt(slack.size)
    held_against = max(deviation, constraint.least_deviation)
    gain = constraint.gain(samples, base)

    def standing(shift: float) -> Standing:
        needed = float(ndtri(1 - level)) * held_against / math.sqrt(rest)
        spread = math.hypot(deviation / math.sqrt(rest), error)
        promise = float(ndtr((float(slack.mean()) + shift - needed) / spread))
        return Standing(setting, len(samples.questions), promise, gain)

    return max(0.0, standing(-error).worth), standing(0.0), standing(error)


def _finalists(standings: Sequence[Standing], most: int) -> tuple[str, ...]:
    able = [s for s in standings if s.gain > 0 and s.promise > _HOPELESS]
    if not able:
        return ()

    best = max(able, key=lambda s: s.worth)
    safer = [s for s in able if s.promise > best.promise and s.gain < best.gain]
    if most == 1 or best.promise >= _SURE or not safer:
        return (best.setting,)
    rest = sorted(safer, key=lambda s: s.worth, reverse=True)[: most - 1]
    return (*(s.setting for s in sorted(rest, key=lambda s: -s.promise)), best.setting)
