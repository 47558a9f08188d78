"""Choosing a setting with a promise.

The questions are put in a random order and divided. On the first part the candidates race
(`choose`): nothing is promised of what is seen there, as a chosen setting flatters itself. Of the
race's finalists, set in order from the safest to the boldest before a held-out question is asked,
each is then to be proved on the held-out questions (`confirm`), at the full error; the first that
is not proved ends it. Such a fixed sequence errs no more often than a single test (Maurer, Hothorn
and Lehmacher 1995; choosing the order on other data as in Laufer-Goldshtein et al. 2023,
"Efficiently controlling multiple risks with Pareto testing"). So the probability that a promise is
made that is not kept is at most 1 − confidence, however many candidates there were.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from flexalign.calibration.goals import Goal, NonInferiority, accuracy_difference
from flexalign.calibration.sequential import Looks, betting_wealth, look_levels, predictive_power
from flexalign.errors import ConfigError
from flexalign.evaluation.samples import Ask, Ledger, Outcomes
from flexalign.statistics import Interval, clustered_interval

# Narrowing the candidates down, on questions that prove nothing later.
#
# Every setting still in the race answers the next few questions. A candidate leaves when even a
# kind reading of its answers makes it less worth than an unkind reading of the best one's: its
# worth is its gain times the probability that the held-out questions will prove it.

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


# Proving a finalist on held-out questions, in as few looks as it takes.

Verdict: TypeAlias = Literal["kept", "futile", "open"]
"""Proved; given up as the rest would hardly prove it; not proved when the questions ended."""

_FUTILE = 0.05


@dataclass(frozen=True)
class Evidence:
    """A setting beside the reference on the same questions; intervals are at 95 %.

    Attributes:
        candidate: Answers of the setting.
        reference: Answers of the reference.
    """

    candidate: Outcomes
    reference: Outcomes

    @property
    def questions(self) -> int:
        """How many."""
        return self.candidate.questions

    @property
    def accuracy(self) -> Interval:
        """Share of the setting's answers that are right."""
        return _interval(self.candidate, share=True)

    @property
    def reference_accuracy(self) -> Interval:
        """Share of the reference's answers that are right."""
        return _interval(self.reference, share=True)

    @property
    def difference(self) -> Interval:
        """Difference of the two, paired by question."""
        return accuracy_difference(self.candidate, self.reference)

    @property
    def tokens(self) -> Interval:
        """Mean tokens of the setting's answers."""
        return _interval(self.candidate, share=False)

    @property
    def reference_tokens(self) -> Interval:
        """Mean tokens of the reference's answers."""
        return _interval(self.reference, share=False)

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


def confirm(
    setting: str,
    reference: str,
    ledger: Ledger,
    questions: Sequence[str],
    goal: Goal,
    alpha: float,
    looks: Looks,
    count: int,
) -> Proof:
    """Ask held-out questions until the promise is proved or is not worth pursuing.

    Giving up early takes nothing from the error, so it needs no share of it.

    Args:
        setting: The finalist.
        reference: What it is compared with.
        ledger: Asks.
        questions: Held out, in order.
        goal: What has to be proved.
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
        base = ledger.outcomes(reference, questions[:end])
        outcomes = ledger.outcomes(setting, questions[:end])
        slack = goal.slack(outcomes, base)
        if betting:
            look = Look(end, float(slack.mean()), betting_wealth(slack, goal.lowest), 1 / alpha)
        else:
            look = Look(end, float(slack.mean()), goal.bound(slack, level), 0.0)
        seen.append(look)
        if look.strength > look.threshold:
            return Proof(setting, "kept", tuple(seen))
        deviation = max(steadied_deviation(slack, goal.unit), goal.least_deviation)
        score = look.slack * math.sqrt(end) / deviation
        if fraction < 1 and predictive_power(score, fraction, levels[-1]) < _FUTILE:
            return Proof(setting, "futile", tuple(seen))
    return Proof(setting, "open", tuple(seen))


def _ends(questions: int, count: int) -> list[int]:
    """Questions at each look: even steps of at least 10, the last one all of them."""
    count = max(1, min(count, questions // 10))
    return [round(questions * (step + 1) / count) for step in range(count)]


def _interval(outcomes: Outcomes, *, share: bool) -> Interval:
    values = outcomes.correct if share else outcomes.tokens
    return clustered_interval(values.ravel(), outcomes.clusters, share=share)


_FEWEST_QUESTIONS = 20


@dataclass(frozen=True)
class TuneOptions:
    """How the choice is made.

    Attributes:
        confidence: That a promise made is kept, in (0.5, 1).
        samples: Samples a question.
        choosing_share: Most of the questions that choosing may use, in (0, 1).
        finalists: How many candidates may be brought to the proof.
        looks: How the proof's error is shared among its looks.
        look_count: Most looks at each finalist.
        seed: Of the order in which the questions are asked.

    Raises:
        ConfigError: If one is out of its range.
    """

    confidence: float = 0.95
    samples: int = 8
    choosing_share: float = 0.3
    finalists: int = 2
    looks: Looks = "obrien-fleming"
    look_count: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise ConfigError(f"confidence must be in (0.5, 1), got {self.confidence}.")
        if not 0 < self.choosing_share < 1:
            raise ConfigError(f"choosing_share must be in (0, 1), got {self.choosing_share}.")
        for name in ("samples", "finalists", "look_count"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.looks not in get_args(Looks):
            raise ConfigError(f"looks must be one of {', '.join(get_args(Looks))}.")


@dataclass(frozen=True)
class Tuned:
    """The answer and all it rests on.

    Attributes:
        chosen: The setting's id; None if none in the range was proved.
        reason: Why that is the answer, one sentence.
        goal: What had to be kept.
        reference: The id of what candidates were compared with.
        candidates: Their ids, as given.
        options: How it was done.
        choice: The race.
        proofs: Of each finalist that came to it, in order.
        at_choice: Evidence of each candidate on the questions it was asked while choosing.
        at_proof: Evidence of each finalist on the held-out questions it was asked.
        held_out: The held-out questions, in order.
        spent: Samples drawn, by setting.
        exhaustive: Samples that every setting on every question would have taken.
    """

    chosen: str | None
    reason: str
    goal: Goal
    reference: str
    candidates: tuple[str, ...]
    options: TuneOptions
    choice: Choice
    proofs: tuple[Proof, ...]
    at_choice: dict[str, Evidence]
    at_proof: dict[str, Evidence]
    held_out: tuple[str, ...]
    spent: dict[str, int]
    exhaustive: int

    @property
    def samples(self) -> int:
        """Samples drawn in all."""
        return sum(self.spent.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "chosen": self.chosen,
            "reason": self.reason,
            "promise": self.goal.text,
            "confidence": self.options.confidence,
            "reference": self.reference,
            "candidates": list(self.candidates),
            "options": asdict(self.options),
            "choice": {
                "finalists": list(self.choice.finalists),
                "questions": list(self.choice.questions),
                "standings": [
                    asdict(standing) | {"evidence": self.at_choice[standing.setting].to_json()}
                    for standing in self.choice.standings
                ],
            },
            "proof": {
                "questions": list(self.held_out),
                "finalists": [
                    asdict(proof) | {"evidence": self.at_proof[proof.setting].to_json()}
                    for proof in self.proofs
                ],
            },
            "samples": {
                "spent": self.samples,
                "by_setting": self.spent,
                "exhaustive": self.exhaustive,
            },
        }


def tune(
    candidates: Sequence[str],
    ask: Ask,
    questions: Sequence[str],
    goal: Goal,
    *,
    reference: str = "λ=0",
    options: TuneOptions | None = None,
) -> Tuned:
    """Choose the setting that gains most among those whose promise can be proved.

    Args:
        candidates: Ids of the settings, without the reference; for a `TokenBudget` the reference
            is taken as a candidate too.
        ask: How samples are drawn.
        questions: Ids of the questions, at least 20.
        goal: What has to be kept, and what is to be gained.
        reference: Id of the setting that candidates are compared with.
        options: How it is done.

    Raises:
        ConfigError: If there is no candidate, one is named twice, there are too few questions, or
            betting is asked for a `TokenBudget`.
    """
    how = options or TuneOptions()
    _check(candidates, reference, questions)
    if how.looks == "betting" and math.isinf(goal.lowest):
        raise ConfigError(
            "betting needs a loss that is bounded, and tokens are not; take looks obrien-fleming."
        )
    racing = list(candidates)
    if not isinstance(goal, NonInferiority):
        racing.insert(0, reference)
    order = list(questions)
    random.Random(how.seed).shuffle(order)
    choosing = max(1, round(how.choosing_share * len(order)))
    ledger, alpha = Ledger(ask, how.samples), 1 - how.confidence
    choice = choose(
        racing,
        reference,
        ledger,
        order[:choosing],
        len(order) - choosing,
        goal,
        alpha,
        how.finalists,
    )
    at_choice = {
        standing.setting: _evidence(
            ledger, standing.setting, reference, order[: standing.questions]
        )
        for standing in choice.standings
    }
    held_out = order[len(choice.questions) :]
    proofs: list[Proof] = []
    for setting in choice.finalists:
        proofs.append(
            confirm(setting, reference, ledger, held_out, goal, alpha, how.looks, how.look_count)
        )
        if proofs[-1].verdict != "kept":
            break
    kept = [proof.setting for proof in proofs if proof.verdict == "kept"]
    at_proof = {
        proof.setting: _evidence(
            ledger, proof.setting, reference, held_out[: proof.looks[-1].questions]
        )
        for proof in proofs
    }
    return Tuned(
        kept[-1] if kept else None,
        _reason(proofs, kept, how.confidence),
        goal,
        reference,
        tuple(racing),
        how,
        choice,
        tuple(proofs),
        at_choice,
        at_proof,
        tuple(held_out),
        dict(ledger.spent),
        len({*racing, reference}) * len(order) * how.samples,
    )


def _check(candidates: Sequence[str], reference: str, questions: Sequence[str]) -> None:
    if not candidates:
        raise ConfigError("there is no candidate; name at least one setting besides λ = 0.")
    twice = [name for name in candidates if list(candidates).count(name) > 1 or name == reference]
    if twice:
        raise ConfigError(
            f"{twice[0]} is given twice (the reference is {reference}); name it once."
        )
    if len(questions) < _FEWEST_QUESTIONS or len(set(questions)) < len(questions):
        raise ConfigError(
            f"tune needs at least {_FEWEST_QUESTIONS} different questions, "
            f"got {len(set(questions))}."
        )


def _evidence(ledger: Ledger, setting: str, reference: str, asked: Sequence[str]) -> Evidence:
    return Evidence(ledger.outcomes(setting, asked), ledger.outcomes(reference, asked))


def _reason(proofs: Sequence[Proof], kept: Sequence[str], confidence: float) -> str:
    if not proofs:
        return "none of the candidates gave hope of a proof when the choice was made"
    last = proofs[-1]
    count = last.looks[-1].questions
    if kept and last.verdict == "kept":
        return f"proved at {100 * confidence:g} % on {count} held-out questions"
    why = (
        f"{last.setting} was given up after {count} held-out questions, as the rest would hardly "
        "have proved it"
        if last.verdict == "futile"
        else f"{last.setting} was not proved when the {count} held-out questions were used up"
    )
    return f"{kept[-1]} was proved at {100 * confidence:g} %; {why}" if kept else why
