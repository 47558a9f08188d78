"""Choosing a setting with a promise.

The questions are put in a random order and divided. On the first part the candidates race
(:mod:`flexalign.calibration.race`): nothing is promised of what is seen there, as a chosen setting
flatters itself. Of the race's finalists, set in order from the safest to the boldest before a
held-out question is asked, each is then to be proved on the held-out questions
(:mod:`flexalign.calibration.verify`), at the full error; the first that is not proved ends it. Such
a fixed sequence errs no more often than a single test (Maurer, Hothorn and Lehmacher 1995; choosing
the order on other data as in Laufer-Goldshtein et al. 2023, "Efficiently controlling multiple risks
with Pareto testing"). So the probability that a promise is made that is not kept is at most
1 − confidence, however many candidates there were.

:func:`tune` is the whole of it for a system, and :func:`tune_stored` for samples that a sweep has
left; :func:`select_setting` takes its samples from any function.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from flexalign.calibration.card import write_card
from flexalign.calibration.constraints import Constraint, NonInferiority
from flexalign.calibration.power import ProofPlan, VarianceModel, plan
from flexalign.calibration.race import Race, race
from flexalign.calibration.results import (
    REFERENCE,
    Ask,
    DrawnSamples,
    Ledger,
    StoredSamples,
)
from flexalign.calibration.sequential import Looks
from flexalign.calibration.verify import Evidence, Proof, verify
from flexalign.errors import ConfigError
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.sweep import Progress, Sweep, sampling_options
from flexalign.evaluation.tasks import Task, load_task
from flexalign.lambdas import Setting, unique_settings
from flexalign.systems import System, parse_system

CANDIDATES = (0.25, 0.5, 0.75, 1.0)
"""The candidates of a system where none is named."""

_FEWEST_QUESTIONS = 20
_MARGIN = 0.02


def tune(
    system: str | System,
    task: str | Task,
    output: str | Path,
    *,
    constraint: Constraint | None = None,
    settings: Sequence[object] = (),
    options: "TuneOptions | None" = None,
    workers: int = 1,
    progress: Progress | None = None,
    **sampling: Any,
) -> "Tuned":
    """Choose the setting of a system that gains most among those whose promise can be proved.

    Args:
        system: What is tuned, as the command line takes it, such as ``dial:BASE,ADAPTER``.
        task: Questions with known answers, at least 20.
        output: The folder for the card and for the samples; a run that broke off goes on from
            them.
        constraint: What has to be kept; if not given, accuracy to within two points of λ = 0.
        settings: The candidates: λ's, policies or settings; λ = 0.25, 0.5, 0.75 and 1 if not
            given.
        options: How it is done; if not given, with the task's own number of samples.
        workers: Processes that grade.
        progress: Told how many samples were made since it was last told.
        **sampling: Fields of :class:`~flexalign.systems.SystemOptions`; temperature,
            top_p and max_new_tokens are the task's own if not given.

    Raises:
        ConfigError: If something is missing or does not go together, there are too few questions,
            or the folder belongs to another configuration.
        LambdaError: If a λ is outside an adapter's range.
        ServingError: If samples could not be made.
    """
    asked = load_task(task) if isinstance(task, str) else task
    tuning = Tuning.of_system(
        parse_system(system) if isinstance(system, str) else system,
        asked,
        constraint or NonInferiority(_MARGIN),
        settings,
        options or TuneOptions(samples=asked.sampling.samples),
        **sampling,
    )
    return tuning.run(Path(output), workers=workers, progress=progress)


def tune_stored(
    folder: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    constraint: Constraint | None = None,
    settings: Sequence[object] = (),
    options: "TuneOptions | None" = None,
) -> "Tuned":
    """Choose a setting from the samples that a sweep has left; nothing is sampled.

    Args:
        folder: A results folder of :func:`~flexalign.evaluation.sweep.evaluate`.
        output: The folder for the card.
        task: The task's name, where the sweep has several.
        constraint: As for :func:`tune`.
        settings: The candidates; all that the folder holds if not given.
        options: How it is done; if not given, with as many samples as the folder has.

    Raises:
        ConfigError: If the folder is none, or there are too few questions.
        DataError: If the folder has too few samples.
    """
    stored = StoredSamples(ResultsFolder.read(Path(folder)), task=task)
    tuning = Tuning.of_stored(
        stored,
        constraint or NonInferiority(_MARGIN),
        settings,
        options or TuneOptions(samples=stored.samples),
    )
    return tuning.run(Path(output))


@dataclass(frozen=True)
class Tuning:
    """A tuning whose parts are checked; nothing is sampled yet.

    Attributes:
        system: The system's name.
        task: The task's name.
        questions: Ids of the questions.
        settings: λ = 0, which candidates are compared with, and then the candidates.
        constraint: What has to be kept.
        options: How it is done.
        source: The stored samples, or the sweep that draws them.
    """

    system: str
    task: str
    questions: tuple[str, ...]
    settings: tuple[Setting, ...]
    constraint: Constraint
    options: "TuneOptions"
    source: StoredSamples | Sweep

    @classmethod
    def of_system(
        cls,
        system: System,
        task: Task,
        constraint: Constraint,
        settings: Sequence[object],
        options: "TuneOptions",
        **sampling: Any,
    ) -> "Tuning":
        """Tune a system on a task. Arguments as for :func:`tune`.

        Raises:
            ConfigError: If the system has no dial, a part of it is not there, or there is no
                candidate.
            LambdaError: If a λ is outside an adapter's range.
        """
        compared = compared_settings(settings or CANDIDATES)
        if len(compared) == 1:
            raise ConfigError(
                "there is no candidate besides λ = 0; name one with --lambda or --policy."
            )
        if system.kind == "model":
            raise ConfigError(
                f"{system.name} has no dial to tune; give dial:, pair: or interpolate:."
            )
        how = sampling_options([task], **sampling)
        sweep = Sweep([system], [task], compared, options.samples, options.seed, options=how)
        ids = tuple(question.id for question in task.questions)
        return cls(system.name, task.name, ids, tuple(compared), constraint, options, sweep)

    @classmethod
    def of_stored(
        cls,
        stored: StoredSamples,
        constraint: Constraint,
        settings: Sequence[object],
        options: "TuneOptions",
    ) -> "Tuning":
        """Tune on samples that are there. Arguments as for :func:`tune`."""
        compared = compared_settings(settings)
        if len(compared) == 1:
            compared += [Setting(name) for name in stored.settings if name != compared[0].id]
        return cls(
            stored.system,
            stored.task,
            tuple(stored.questions),
            tuple(compared),
            constraint,
            options,
            stored,
        )

    @property
    def sweep(self) -> Sweep:
        """The sweep that draws the samples.

        Raises:
            ConfigError: If they are stored, and none is drawn.
        """
        if isinstance(self.source, StoredSamples):
            raise ConfigError("the samples of this tuning are stored; none is drawn.")
        return self.source

    def run(self, output: Path, *, workers: int = 1, progress: Progress | None = None) -> "Tuned":
        """Choose a setting, and write the card; what is drawn is kept in the same folder.

        Raises:
            ConfigError: If there are too few questions, or the folder belongs to another
                configuration.
            ServingError: If samples could not be made.
        """
        if isinstance(self.source, StoredSamples):
            tuned = self._select(self.source.ask)
        else:
            with DrawnSamples(self.sweep, output, workers=workers, progress=progress) as samples:
                tuned = self._select(samples.ask)
        write_card(tuned, output, {"system": self.system, "task": self.task})
        return tuned

    def _select(self, ask: Ask) -> "Tuned":
        reference, *candidates = [setting.id for setting in self.settings]
        return select_setting(
            candidates,
            ask,
            self.questions,
            self.constraint,
            reference=reference,
            options=self.options,
        )


def compared_settings(candidates: Sequence[object]) -> list[Setting]:
    """Name the candidates, and put λ = 0, which they are compared with, in front.

    Raises:
        ConfigError: If one is malformed, or given twice.
    """
    reference = Setting.of(0.0)
    return [reference, *(one for one in unique_settings(candidates) if one != reference)]


def plan_tuning(
    questions: int, options: "TuneOptions", variance: VarianceModel, power: float = 0.8
) -> ProofPlan:
    """Say what a tuning can prove, before anything is sampled.

    Args:
        questions: How many there are.
        options: How it is done.
        variance: Assumed or measured.
        power: Probability of the proof where candidate and reference are equally good.
    """
    return plan(
        questions,
        options.samples,
        confidence=options.confidence,
        power=power,
        variance=variance,
        choosing_share=options.choosing_share,
    )


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
        constraint: What had to be kept.
        reference: The id of what candidates were compared with.
        candidates: Their ids, as given.
        options: How it was done.
        race: The race.
        proofs: Of each finalist that came to it, in order.
        at_choice: Evidence of each candidate on the questions it was asked while choosing.
        at_proof: Evidence of each finalist on the held-out questions it was asked.
        held_out: The held-out questions, in order.
        spent: Samples drawn, by setting.
        exhaustive: Samples that every setting on every question would have taken.
    """

    chosen: str | None
    reason: str
    constraint: Constraint
    reference: str
    candidates: tuple[str, ...]
    options: TuneOptions
    race: Race
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
            "promise": self.constraint.text,
            "confidence": self.options.confidence,
            "reference": self.reference,
            "candidates": list(self.candidates),
            "options": asdict(self.options),
            "choice": {
                "finalists": list(self.race.finalists),
                "questions": list(self.race.questions),
                "standings": [
                    asdict(standing) | {"evidence": self.at_choice[standing.setting].to_json()}
                    for standing in self.race.standings
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


def select_setting(
    candidates: Sequence[str],
    ask: Ask,
    questions: Sequence[str],
    constraint: Constraint,
    *,
    reference: str = REFERENCE,
    options: TuneOptions | None = None,
) -> Tuned:
    """Choose the setting that gains most among those whose promise can be proved.

    Args:
        candidates: Ids of the settings, without the reference; for a `TokenBudget` the reference
            is taken as a candidate too.
        ask: How samples are drawn.
        questions: Ids of the questions, at least 20.
        constraint: What has to be kept, and what is to be gained.
        reference: Id of the setting that candidates are compared with.
        options: How it is done.

    Raises:
        ConfigError: If there is no candidate, one is named twice, there are too few questions, or
            betting is asked for a `TokenBudget`.
    """
    how = options or TuneOptions()
    _check(candidates, reference, questions)
    if how.looks == "betting" and math.isinf(constraint.lowest):
        raise ConfigError(
            "betting needs a loss that is bounded, and tokens are not; take looks obrien-fleming."
        )
    racing = list(candidates)
    if not isinstance(constraint, NonInferiority):
        racing.insert(0, reference)

    order = list(questions)
    random.Random(how.seed).shuffle(order)
    choosing = max(1, round(how.choosing_share * len(order)))
    ledger, alpha = Ledger(ask, how.samples), 1 - how.confidence

    raced = race(
        racing,
        reference,
        ledger,
        order[:choosing],
        len(order) - choosing,
        constraint,
        alpha,
        how.finalists,
    )
    at_choice = {
        standing.setting: _evidence(
            ledger, standing.setting, reference, order[: standing.questions]
        )
        for standing in raced.standings
    }

    # Questions that the race did not come to are held out, too.
    held_out = order[len(raced.questions) :]
    proofs: list[Proof] = []
    for setting in raced.finalists:
        proofs.append(
            verify(
                setting, reference, ledger, held_out, constraint, alpha, how.looks, how.look_count
            )
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
        constraint,
        reference,
        tuple(racing),
        how,
        raced,
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
    return Evidence(ledger.samples(setting, asked), ledger.samples(reference, asked))


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
