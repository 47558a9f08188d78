"""Narrowing the candidates down, on questions that prove nothing later.

Every setting still in the race answers the next few questions. A candidate leaves when even a
kind reading of its answers makes it less worth than an unkind reading of the best one's: its
worth is its gain times the probability that the held-out questions will prove it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from flexalign.calibration.goals import Goal
from flexalign.calibration.outcomes import Ledger, Outcomes

__all__ = ["Choice", "Standing", "choose", "steadied_deviation"]

_HOPELESS = 0.05
_SURE = 0.9
_BATCHES = 5
_FEWEST = 8


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
class Choice:
    """What the race came to.

    Attributes:
        finalists: To be confirmed, safest first; empty if none has a chance.
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


def choose(
    candidates: Sequence[str],
    reference: str,
    ledger: Ledger,
    questions: Sequence[str],
    held_out: int,
    goal: Goal,
    level: float,
    finalists: int,
) -> Choice:
    """Race the candidates.

    Args:
        candidates: Their ids.
        reference: The id of what they are compared with.
        ledger: Asks.
        questions: At most these are used, in order.
        held_out: How many further questions there are for the proof.
        goal: What counts.
        level: One-sided error of the proof.
        finalists: How many may go on.
    """
    racing = list(candidates)
    left: dict[str, Standing] = {}
    size = max(_FEWEST, math.ceil(len(questions) / _BATCHES))
    used = 0
    while racing and used < len(questions) and (used == 0 or len(racing) > 1):
        used = min(used + size, len(questions))
        rest = held_out + len(questions) - used
        base = ledger.outcomes(reference, questions[:used])
        read = {
            setting: _read(
                setting, ledger.outcomes(setting, questions[:used]), base, goal, rest, level
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
    return Choice(_finalists(standings, finalists), standings, tuple(questions[:used]))


def _read(
    setting: str, outcomes: Outcomes, base: Outcomes, goal: Goal, rest: int, level: float
) -> tuple[float, Standing, Standing]:
    """The worth by an unkind reading, the standing, the standing by a kind one."""
    slack = goal.slack(outcomes, base)
    deviation = steadied_deviation(slack, goal.unit)
    error = deviation / math.sqrt(slack.size)
    held_against = max(deviation, goal.least_deviation)
    gain = goal.gain(outcomes, base)

    def standing(shift: float) -> Standing:
        needed = float(ndtri(1 - level)) * held_against / math.sqrt(rest)
        spread = math.hypot(deviation / math.sqrt(rest), error)
        promise = float(ndtr((float(slack.mean()) + shift - needed) / spread))
        return Standing(setting, outcomes.questions, promise, gain)

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
