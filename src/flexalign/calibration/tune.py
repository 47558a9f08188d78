"""Chooses a setting for which a promise, such as a bound on the loss of accuracy, is proved.

The questions are put in a random order and divided. The first part is for the race of the
candidates (:mod:`flexalign.calibration.race`). Its figures prove nothing, as they are biased in
favour of the setting that is chosen by them. The race returns finalists, ordered from the safest to
the boldest before any held-out question is asked. Each finalist is then tested on the held-out
questions (:mod:`flexalign.calibration.verify`) at the full error; testing ends with the first that
is not proved. Such a fixed sequence errs no more often than a single test (Maurer, Hothorn and
Lehmacher 1995; the order is chosen on other data as in Laufer-Goldshtein et al. 2023, "Efficiently
controlling multiple risks with Pareto testing"). So the probability that a promise is made and not
kept is at most 1 − confidence, for any number of candidates.

:func:`tune` does all steps for a system, and :func:`tune_stored` for the samples of a sweep;
:func:`select_setting` takes its samples from any function.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from flexalign.calibration.card import write_card
from flexalign.calibration.constraints import Constraint, NonInferiority
from flexalign.calibration.power import ProofPlan, assumed_variance, measured_variance, plan
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
from flexalign.lambdas import OnlyEnds, Setting, unique_settings
from flexalign.systems import System, parse_system

CANDIDATES = (0.25, 0.5, 0.75, 1.0)
"""The default candidates, as λ, of a system whose λ has no range of its own."""

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
        system: The system, in the form of the command line, such as ``dial:BASE,ADAPTER``.
        task: Questions with known answers, at least 20.
        output: The folder for the card and the samples, from which an interrupted run continues.
        constraint: The constraint to prove; if not given, an accuracy within two points of λ = 0.
        settings: The candidates: λ's, policies or settings; if not given, :func:`default_candidates`.
        options: Options of the choice; if not given, the defaults with the task's own number of
            samples.
        workers: Number of processes that grade.
        progress: Called with the number of samples made since its last call.
        **sampling: Fields of :class:`~flexalign.systems.SystemOptions`; temperature,
            top_p and max_new_tokens are the task's own if not given.

    Raises:
        ConfigError: If something is missing, arguments contradict each other, there are too few
            questions, or the folder belongs to another configuration.
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
    """Choose a setting from the stored samples of a sweep; nothing is sampled.

    Args:
        folder: A results folder of :func:`~flexalign.evaluation.sweep.evaluate`.
        output: The folder for the card.
        task: The task's name; only needed if the sweep has several.
        constraint: As for :func:`tune`.
        settings: The candidates; all settings of the folder if not given.
        options: Options of the choice; if not given, the defaults with as many samples as the
            folder has.

    Raises:
        ConfigError: If the folder is not a results folder, or there are too few questions.
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
        settings: λ = 0, the reference, followed by the candidates.
        constraint: The constraint to prove.
        options: Options of the choice.
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
            ConfigError: If the system has no dial, a part of it is missing, or there is no
                candidate.
            DataError: If the system cannot be asked one of the questions.
            LambdaError: If a λ is outside an adapter's range.
        """
        compared = compared_settings(
            settings or default_candidates(system, sampling.get("lambda_range"))
        )
        if len(compared) == 1:
            raise ConfigError(
                "there is no candidate besides λ = 0; name one with --lambda or --policy."
            )
        if system.kind == "model":
            raise ConfigError(
                f"{system.name} has no dial to tune; give dial:, pair:, prompts: or interpolate:."
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
        """Tune on stored samples. Arguments as for :func:`tune`."""
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
            ConfigError: If the samples are stored, so that none is drawn.
        """
        if isinstance(self.source, StoredSamples):
            raise ConfigError("the samples of this tuning are stored; none is drawn.")
        return self.source

    def require_possible(self) -> None:
        """Refuse a tuning that cannot be run, before anything is sampled or written.

        Raises:
            ConfigError: If there are too few questions, or the looks do not fit the constraint.
        """
        reference, *candidates = [setting.id for setting in self.settings]
        _check(candidates, reference, self.questions, self.constraint, self.options)

    def run(self, output: Path, *, workers: int = 1, progress: Progress | None = None) -> "Tuned":
        """Choose a setting, and write the card; samples that are drawn are kept in the same folder.

        Raises:
            ConfigError: If there are too few questions, or the folder belongs to another
                configuration.
            ServingError: If samples could not be made.
        """
        self.require_possible()
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


def default_candidates(
    system: System, permitted: tuple[float, float] | None = None
) -> tuple[float, ...]:
    """Return the λ to compare where none is given.

    For a dial they are its range in quarters, or only the ends where only these are permitted; for
    other systems `CANDIDATES`. λ = 0, the reference, is not among them.

    Args:
        system: The system.
        permitted: The range to permit instead of the dial's own.
    """
    if system.kind != "dial":
        return CANDIDATES
    from flexalign.systems.dials import read_dial

    within = permitted or read_dial(system.parts[1]).lambda_range
    low, high = within
    quarters = () if isinstance(within, OnlyEnds) else (1, 2, 3)
    between = [round(low + (high - low) * quarter / 4, 6) for quarter in quarters]
    return tuple(lam for lam in dict.fromkeys((low, *between, high)) if lam != 0)


def compared_settings(candidates: Sequence[object]) -> list[Setting]:
    """Make settings of the candidates, with the reference, λ = 0, in front.

    Raises:
        ConfigError: If one is malformed, or given twice.
    """
    reference = Setting.of(0.0)
    return [reference, *(one for one in unique_settings(candidates) if one != reference)]


def plan_tuning(
    source: Task | StoredSamples,
    options: "TuneOptions",
    *,
    accuracy: float | None = None,
    power: float = 0.8,
) -> ProofPlan:
    """Compute what a tuning can prove, before anything is sampled.

    Args:
        source: The task that will be sampled, or stored samples, whose variance is measured.
        options: Options of the choice.
        accuracy: The expected accuracy, from which the variance is assumed; if not given, that of
            the task, or the variance of stored samples.
        power: Probability of the proof if candidate and reference are equally good.

    Raises:
        ConfigError: If stored samples lack λ = 0 or a candidate.
        DataError: If there are fewer than 2 questions with 2 stored samples each.
    """
    if isinstance(source, Task):
        variance = assumed_variance(source.name, accuracy)
    elif accuracy is not None:
        variance = assumed_variance(source.task, accuracy)
    else:
        variance = measured_variance(source)
    return plan(
        len(source.questions),
        options.samples,
        confidence=options.confidence,
        power=power,
        variance=variance,
        choosing_share=options.choosing_share,
    )


@dataclass(frozen=True)
class TuneOptions:
    """Options of the choice.

    Attributes:
        confidence: Probability that no promise is made that is not kept, in (0.5, 1).
        samples: Samples of each question.
        choosing_share: Largest share of the questions that the race may use, in (0, 1).
        finalists: Largest number of candidates that are tested on held-out questions.
        looks: How the error of the proof is divided among its looks.
        look_count: Largest number of looks at each finalist.
        seed: Seed of the order of the questions.

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
    """The chosen setting, with its evidence.

    Attributes:
        chosen: The setting's id; None if no candidate was proved.
        reason: The reason for the choice, one sentence.
        constraint: The constraint to prove.
        reference: Id of the setting that candidates were compared with.
        candidates: Ids of the settings in the race, in the given order.
        options: Options of the choice.
        race: The result of the race.
        proofs: The proof of each tested finalist, in order.
        at_choice: Evidence of each candidate on the questions it was asked in the race.
        at_proof: Evidence of each tested finalist on the held-out questions it was asked.
        held_out: The held-out questions, in order.
        spent: Number of samples drawn, by setting.
        exhaustive: Number of samples of every setting on every question, for comparison.
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
        """Number of samples drawn at all settings."""
        return sum(self.spent.values())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, as the card keeps it."""
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
            is added as a candidate.
        ask: The function that draws samples.
        questions: Ids of the questions, at least 20.
        constraint: The constraint to prove, with the gain by which settings are chosen.
        reference: Id of the setting that candidates are compared with.
        options: Options of the choice; the defaults if not given.

    Raises:
        ConfigError: If there is no candidate, one is named twice, there are too few questions, or
            betting is requested for a `TokenBudget`.
    """
    how = options or TuneOptions()
    _check(candidates, reference, questions, constraint, how)

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

    # Questions that the race did not use are held out, too.
    held_out = order[len(raced.questions) :]
    proofs: list[Proof] = []
    for setting in raced.finalists:
        proofs.append(
            verify(
                setting, reference, ledger, held_out, constraint, alpha, how.looks, how.look_count
            )
        )
        if proofs[-1].verdict != "kept":
            break  # the fixed sequence ends with the first that is not proved

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


def _check(
    candidates: Sequence[str],
    reference: str,
    questions: Sequence[str],
    constraint: Constraint,
    options: TuneOptions,
) -> None:
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
    if options.looks == "betting" and math.isinf(constraint.lowest):
        raise ConfigError(
            "betting needs a loss that is bounded, and tokens are not; take looks obrien-fleming."
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
