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
from typing import Any, get_args

from flexalign.calibration.choose import Choice, choose
from flexalign.calibration.confirm import Evidence, Proof, confirm
from flexalign.calibration.goals import Goal, NonInferiority
from flexalign.calibration.outcomes import Ask, Ledger
from flexalign.calibration.sequential import Looks
from flexalign.errors import ConfigError

__all__ = ["TuneOptions", "Tuned", "tune"]

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
