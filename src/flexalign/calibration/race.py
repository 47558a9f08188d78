"""The race: selects finalists among the candidates, on questions that are not used for the proof.

In each step all settings still in the race answer the next few questions. The worth of a candidate
is its gain times the probability that the held-out questions will prove it. A candidate leaves the
race when its worth at one standard error above the estimate is below the best candidate's worth at
one standard error below the estimate.
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
"""A candidate leaves the race if its proof is no more probable than this."""

_SURE = 0.9
"""A finalist is tested alone if its proof is at least as probable as this."""

_BATCHES = 5
"""Largest number of steps of the race."""

_FEWEST = 8
"""Least number of questions in a step."""


@dataclass(frozen=True)
class Standing:
    """The figures of a candidate when it left the race, or at the end of the race.

    Attributes:
        setting: The setting's id.
        questions: Number of questions it answered.
        promise: Probability that the held-out questions will prove it, estimated from these.
        gain: The setting's gain.
    """

    setting: str
    questions: int
    promise: float
    gain: float

    @property
    def worth(self) -> float:
        """Expected gain: the gain times the probability of the proof."""
        return self.promise * self.gain


@dataclass(frozen=True)
class Race:
    """The result of the race.

    Attributes:
        finalists: Ids of the settings to be verified, safest first; empty if none has a chance.
        standings: All candidates, in the given order.
        questions: The questions that were used.
    """

    finalists: tuple[str, ...]
    standings: tuple[Standing, ...]
    questions: tuple[str, ...]


def steadied_deviation(slack: NDArray[np.float64], unit: float) -> float:
    """Return the standard deviation of the slack over questions, kept above 0.

    It is computed as if one more question were half a unit away from the mean, so that it is not 0
    if a few questions show no difference.

    Args:
        slack: One value for each question, shape (n,), at least 2.
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
    """Run the race.

    Args:
        candidates: Ids of the settings.
        reference: Id of the setting that they are compared with.
        ledger: The ledger, which asks the questions.
        questions: The questions that may be used, in order.
        held_out: Number of further questions for the proof.
        constraint: The constraint to prove.
        level: One-sided error of the proof.
        finalists: Largest number of finalists.
    """
    racing = list(candidates)
    left: dict[str, Standing] = {}
    size = max(_FEWEST, math.ceil(len(questions) / _BATCHES))
    used = 0

    # With one candidate left there is nothing to choose, and all other questions are kept for the
    # proof.
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
    """Read one candidate's samples.

    Returns:
        Its worth one standard error below the estimate, its standing at the estimate, and its
        standing one standard error above the estimate.
    """
    slack = constraint.slack(samples, base)
    deviation = steadied_deviation(slack, constraint.unit)
    error = deviation / math.sqrt(slack.size)
    assumed_deviation = max(deviation, constraint.least_deviation)
    gain = constraint.gain(samples, base)

    def standing(shift: float) -> Standing:
        needed = float(ndtri(1 - level)) * assumed_deviation / math.sqrt(rest)
        spread = math.hypot(deviation / math.sqrt(rest), error)
        promise = float(ndtr((float(slack.mean()) + shift - needed) / spread))
        return Standing(setting, len(samples.questions), promise, gain)

    return max(0.0, standing(-error).worth), standing(0.0), standing(error)


def _finalists(standings: Sequence[Standing], most: int) -> tuple[str, ...]:
    """Return the candidate of most worth, after up to ``most − 1`` safer ones of less gain."""
    able = [s for s in standings if s.gain > 0 and s.promise > _HOPELESS]
    if not able:
        return ()

    best = max(able, key=lambda s: s.worth)
    safer = [s for s in able if s.promise > best.promise and s.gain < best.gain]
    if most == 1 or best.promise >= _SURE or not safer:
        return (best.setting,)
    rest = sorted(safer, key=lambda s: s.worth, reverse=True)[: most - 1]
    return (*(s.setting for s in sorted(rest, key=lambda s: -s.promise)), best.setting)
