"""Realigns the miniature and compares the students with its closed form.

:func:`run_demo` is what ``flexalign demo`` runs in minutes; the results document uses the same
functions with longer trainings. One LoRA is trained for all λ, and its accuracy, tokens and habits
at several λ are compared with those of equation 5; so is a student of two rounds. Then the dial of
an InRa adapter is measured, with the policies that choose between its two ends.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from flexalign._storage import write_json
from flexalign.errors import DataError
from flexalign.evaluation.frontier import (
    ParetoCurve,
    ParetoPoint,
    distance_intervals,
    draw_pareto,
)
from flexalign.evaluation.samples import Samples
from flexalign.generation.responses import generate_responses
from flexalign.generation.two_prompts import TwoPromptDecoder
from flexalign.inra import InRaModel
from flexalign.lambdas import LambdaRange
from flexalign.lora_dial import LoRADial
from flexalign.miniature import ALIGNED, REFERENCE, folder, make_questions, make_traces
from flexalign.miniature.build import encode, sorted_by_length
from flexalign.miniature.closed_form import HabitsOutcome, expected_outcome, token_level
from flexalign.miniature.measure import count_branches, is_right, mean_habits, split_trace
from flexalign.miniature.world import Habits, Question
from flexalign.models.loading import load_model, load_tokenizer
from flexalign.statistics import Interval, clustered_interval, paired_difference_interval
from flexalign.training import TrRaConfig, TrRaTrainer

LONGEST_RESPONSE = 1000
"""Limit on new tokens; far above the reference's longest response, so that nothing is cut off."""


@dataclass(frozen=True)
class Training:
    """How a student is trained in the miniature.

    Attributes:
        steps: Optimizer steps of `batch_size` traces.
        learning_rate: Peak learning rate; warm-up over a tenth of the steps, then cosine decay to
            zero.
        batch_size: Traces in each step.
        divergence: As in :class:`flexalign.TrRaConfig`, like the next two.
        rollouts: Share of the batches that the student samples.
        rollout_objective: The objective of these batches.
        seed: Seed of the traces and of their order.
        by_length: Whether each batch has traces of similar length, which halves the work.
        rank: Rank of the LoRA; only for a dial.
    """

    steps: int = 150
    learning_rate: float = 5e-4
    batch_size: int = 24
    divergence: str = "reverse"
    rollouts: float = 0.0
    rollout_objective: str = "token"
    seed: int = 0
    by_length: bool = False
    rank: int = 32


@dataclass(frozen=True)
class Measurement:
    """The measurement of one model on the miniature's questions.

    Attributes:
        name: The model's name in tables.
        accuracy: Share of right answers, 0…1.
        accuracy_interval: Its 95 % interval, low and high.
        tokens: Mean tokens of a response.
        tokens_interval: Its 95 % interval, low and high.
        habits: The model's habits, counted in its responses.
        expected: Accuracy and tokens of the closed form.
        expected_habits: The habits behind `expected`.
    """

    name: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    tokens: float
    tokens_interval: tuple[float, float]
    habits: Habits
    expected: HabitsOutcome
    expected_habits: Habits

    def to_json(self) -> dict[str, Any]:
        """Return all fields by name, nested ones as dictionaries."""
        return asdict(self)


def load_pair() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the miniature's reference, its aligned model and their tokenizer."""
    reference, aligned = (load_model(str(folder(part))) for part in ("reference", "aligned"))
    return reference, aligned, load_tokenizer(str(folder("reference")))


def realign(
    aligned: PreTrainedModel,
    lam: float,
    output: Path,
    training: Training,
    gate: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    start: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Train a student towards equation 5 over the miniature's reference at λ, and return it.

    Args:
        aligned: The aligned model; for a further round, the student of the round before.
        lam: λ of equation 5.
        output: The trainer's output folder.
        training: Options of the training.
        gate: The gate τ of the teacher.
        callbacks: Callbacks of the trainer.
        start: The student's initial model, which is changed in place; a new copy of the reference
            if None.
    """
    student = load_model(str(folder("reference"))) if start is None else start
    trainer = _trainer(student, aligned, lam, output, training, gate, callbacks)
    trainer.train()
    return student.eval()


def realign_dial(
    aligned: PreTrainedModel,
    within: LambdaRange,
    output: Path,
    training: Training,
    gate: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> LoRADial:
    """Train one LoRA on the miniature's reference for all λ of a range, and return the dial.

    Args:
        aligned: The aligned model.
        within: The range of λ.
        output: The trainer's output folder, in which the dial's folder is written too.
        training: Options of the training, with a `rank`.
        gate: The gate τ of the teacher.
        callbacks: Callbacks of the trainer.
    """
    trainer = _trainer(None, aligned, within.to_json(), output, training, gate, callbacks)
    trainer.train()
    trainer.save_model(str(output / "dial"))
    return LoRADial.from_pretrained("miniature:reference", output / "dial")


def _trainer(
    student: PreTrainedModel | None,
    aligned: PreTrainedModel,
    lam: float | dict[str, float],
    output: Path,
    training: Training,
    gate: float | None,
    callbacks: Sequence[TrainerCallback],
) -> TrRaTrainer:
    """Return the trainer of a student, or of a LoRA on the reference if there is none."""
    tokenizer = load_tokenizer(str(folder("reference")))
    rows = make_traces(training.steps * training.batch_size, seed=1_000 + training.seed)
    if training.by_length:
        rows = sorted_by_length(rows, training.batch_size, training.seed)

    lora = None
    if student is None:
        lora = LoraConfig(
            r=training.rank, lora_alpha=training.rank, target_modules="all-linear", lora_dropout=0.0
        )

    trainer = TrRaTrainer(
        student,
        reference="miniature:reference",
        aligned=aligned,
        peft_config=lora,
        args=TrRaConfig(
            output_dir=str(output),
            lam=lam,
            gate=gate,
            divergence=training.divergence,
            rollouts=training.rollouts,
            rollout_objective=training.rollout_objective,
            max_steps=training.steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=training.steps // 10,
            per_device_train_batch_size=training.batch_size,
            train_sampling_strategy="sequential" if training.by_length else "random",
            max_length=512,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=training.seed,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{k: row[k] for k in ("prompt", "completion")} for row in rows]
        ),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    temperature: float = 1.0,
    batch_size: int = 128,
    max_new_tokens: int = LONGEST_RESPONSE,
    **generate_options: Any,
) -> list[list[str]]:
    """Sample one trace of a model for each question; temperature 0 is greedy."""
    prompts: list[Any] = [[{"role": "user", "content": question.text}] for question in questions]
    if isinstance(model, TwoPromptDecoder):
        prompts = [model.rendering.both(prompt) for prompt in prompts]
    responses = generate_responses(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        **generate_options,
    )
    return [split_trace(response.text) for response in responses]


def measure(
    name: str,
    questions: Sequence[Question],
    traces: Sequence[Sequence[str]],
    expected_habits: Habits,
) -> Measurement:
    """Measure the accuracy, the tokens and the habits of sampled traces.

    Args:
        name: The model's name in tables.
        questions: The questions.
        traces: One response to each question.
        expected_habits: The habits of the closed form.
    """
    right = [is_right(question, trace) for question, trace in zip(questions, traces, strict=True)]
    clusters = range(len(questions))
    accuracy = clustered_interval(np.array(right, dtype=float), clusters)
    tokens = clustered_interval(np.array([len(trace) for trace in traces], dtype=float), clusters)
    return Measurement(
        name=name,
        accuracy=accuracy[1],
        accuracy_interval=(accuracy[0], accuracy[2]),
        tokens=tokens[1],
        tokens_interval=(tokens[0], tokens[2]),
        habits=mean_habits(count_branches(questions, traces)),
        expected=expected_outcome(expected_habits),
        expected_habits=expected_habits,
    )


def closed_form_curve(gate: float | None = None, highest: float = 10.0) -> ParetoCurve:
    """Return the curve of tokens and accuracy under equation 5 for λ from 0 to `highest`."""
    outcomes = [
        expected_outcome(token_level(REFERENCE, ALIGNED, lam, gate))
        for lam in np.linspace(0, highest, 200)
    ]
    return ParetoCurve(
        label="equation 5, closed form" + ("" if gate is None else f", gate τ={gate:g}"),
        tokens=[outcome.tokens for outcome in outcomes],
        accuracies=[outcome.accuracy for outcome in outcomes],
    )


def picture(
    path: Path, groups: dict[str, Sequence[Measurement]], curves: Sequence[ParetoCurve]
) -> None:
    """Draw measurements, one colour for each group, over the closed form's curves."""
    points = [
        ParetoPoint(m.name, group, m.tokens, m.tokens_interval, m.accuracy, m.accuracy_interval)
        for group, members in groups.items()
        for m in members
    ]
    named = {point.label: point for point in points}
    ends = (
        [(named["reference"], named["aligned"])] if {"reference", "aligned"} <= set(named) else []
    )
    draw_pareto(path, points, curves, "The miniature: what a setting of λ buys", ends)


# Policies between a dial's two ends, computed from the answers of both ends to the same questions:
# all thresholds and shares are compared on the same samples.


@dataclass(frozen=True)
class JudgedAnswers:
    """One answer to each of N questions.

    Attributes:
        right: Whether each answer is right, shape (N,).
        tokens: Number of tokens of each, including rejected answers, shape (N,).
    """

    right: NDArray[np.bool_]
    tokens: NDArray[np.int64]

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of an answer."""
        return float(self.tokens.mean())


@dataclass(frozen=True)
class CascadeFigures:
    """The accuracy and the tokens of a setting, compared with the dial's ends, with 95 % intervals.

    Attributes:
        accuracy: Share of right answers.
        tokens: Mean tokens of an answer.
        difference: Accuracy minus that of the slow end, paired by question.
        over_coin: Accuracy above the straight line between the two ends; the interval includes the
            uncertainty of the line. It is 0 for the ends themselves.
    """

    accuracy: Interval
    tokens: Interval
    difference: Interval
    over_coin: Interval


def judge(questions: Sequence[Question], traces: Sequence[Sequence[str]]) -> JudgedAnswers:
    """Grade one trace for each question."""
    right = [is_right(question, trace) for question, trace in zip(questions, traces, strict=True)]
    return JudgedAnswers(np.array(right), np.array([len(trace) for trace in traces]))


@torch.no_grad()
def confidences(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    traces: Sequence[Sequence[str]],
    lam: float = 1.0,
) -> NDArray[np.float64]:
    """Compute the probability of each answer, including its end, under a dial at λ.

    It is the measure ``answer_probability`` of :class:`flexalign.Adaptive`.

    Returns:
        One probability for each answer, shape (N,).
    """
    rows = [
        encode(tokenizer, question.text, list(trace))
        for question, trace in zip(questions, traces, strict=True)
    ]
    found = np.zeros(len(rows))

    # Rows of equal lengths form a batch, so that no padding is needed.
    shapes = [(len(asked), len(answered)) for asked, answered in rows]
    for asked_tokens, answered_tokens in sorted(set(shapes)):
        chosen = [i for i, shape in enumerate(shapes) if shape == (asked_tokens, answered_tokens)]
        ids = torch.tensor([rows[i][0] + rows[i][1] for i in chosen])
        logits = model(input_ids=ids, lam=lam).logits[:, asked_tokens - 1 : -1]
        tokens = logits.double().log_softmax(-1).gather(-1, ids[:, asked_tokens:, None])
        found[chosen] = tokens[..., 0].sum(-1).exp().numpy()
    return found


def adaptive(
    fast: JudgedAnswers, slow: JudgedAnswers, confidence: NDArray[np.float64], threshold: float
) -> JudgedAnswers:
    """Choose the fast answer if its confidence reaches the threshold, else the slow one.

    The tokens of a rejected fast answer are counted.
    """
    _require_same(fast, slow)
    accepted = confidence >= threshold
    return JudgedAnswers(
        np.where(accepted, fast.right, slow.right),
        fast.tokens + np.where(accepted, 0, slow.tokens),
    )


def coin(fast: JudgedAnswers, slow: JudgedAnswers, share: float, seed: int = 0) -> JudgedAnswers:
    """Choose the slow answer with probability `share`, else the fast one, for each question."""
    _require_same(fast, slow)
    draw = random.Random(seed)
    is_slow = np.array([draw.random() < share for _ in fast.right])
    return JudgedAnswers(
        np.where(is_slow, slow.right, fast.right), np.where(is_slow, slow.tokens, fast.tokens)
    )


def compare_with_ends(
    answers: JudgedAnswers, fast: JudgedAnswers, slow: JudgedAnswers
) -> CascadeFigures:
    """Compare a setting with the dial's two ends, on the same questions."""
    _require_same(answers, slow)
    questions = range(len(slow.right))
    measured = [Samples(questions, one.right, one.tokens) for one in (slow, fast, answers)]
    place = next((i for i, end in enumerate((slow, fast)) if end is answers), 2)
    distances = distance_intervals(measured, ends=(0, 1))
    chords = [one.chord for one in distances if one.chord is not None]
    return CascadeFigures(
        clustered_interval(answers.right, questions, share=True),
        clustered_interval(answers.tokens, questions, share=False),
        paired_difference_interval(answers.right, questions, slow.right, questions),
        chords[place],
    )


def _require_same(first: JudgedAnswers, second: JudgedAnswers) -> None:
    if len(first.right) != len(second.right):
        raise DataError(
            f"there are {len(first.right)} and {len(second.right)} answers; "
            "both ends must answer the same questions."
        )


# The demo itself.

_LEARNING_RATE = 1e-3
"""For a short training of a student; the results document uses half of it and more steps."""

_DIAL_LEARNING_RATE = 3e-3
"""For a short training of the LoRA; a rank of 32 bears more than all weights do."""

_LAMBDAS = (0.5, 1.0, 2.0, 3.0, 5.0)
"""The settings at which the LoRA answers."""

_GATE = 0.01
"""τ of all trainings: what both models do alike is not extrapolated, so that λ = 5 is useful."""

_QUESTION_SEED = 10_000
"""Added to the demo's seed for its questions; far from the seeds of training data."""

_THRESHOLD = 0.44
"""The adaptive policy's threshold; ``benchmarks/dial.py`` chose it on other questions."""

_LIMIT = 200
"""Limit on new tokens of the fast adapter at λ = 0.5, where a response may not end."""

_LORA_LIMIT = 400
"""The same for the LoRA, which breaks at λ = 5 if it has had few steps."""


@dataclass(frozen=True)
class DialRow:
    """One setting of the fast adapter's dial, with its figures.

    Attributes:
        name: The setting's name in the table.
        figures: Its figures, compared with the dial's two ends.
    """

    name: str
    figures: CascadeFigures

    def to_json(self) -> dict[str, Any]:
        """Return all fields by name; an interval is low, estimate, high."""
        return {"name": self.name, **asdict(self.figures)}


def run_demo(
    output: Path,
    *,
    questions: int,
    steps: int,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[list[Measurement], list[DialRow]]:
    """Train and measure all models of the demo, and write its plot and figures.

    Args:
        output: Folder for ``pareto.png`` and ``demo.json``; it must exist.
        questions: Number of questions that each model answers.
        steps: Training steps of the LoRA, and of the student of two rounds.
        seed: Seed of questions, training and sampling.
        progress: Called with the name of the current step, how much of it is done, and how much
            there is; for each step first with 0 done.

    Returns:
        The measurements of the models, and the figures of the dial's settings.
    """
    asked = make_questions(questions, seed=_QUESTION_SEED + seed)
    training = Training(steps=steps, learning_rate=_LEARNING_RATE, seed=seed, by_length=True)
    measurements: list[Measurement] = []

    with TemporaryDirectory() as scratch:
        reference, aligned, tokenizer = load_pair()

        def ask(name: str, model: Any, repeats: int = 1, **options: Any) -> list[list[str]]:
            what, wanted = f"{name}: answers", questions * repeats
            progress(what, 0, wanted)
            return respond(
                model,
                tokenizer,
                asked * repeats,
                seed=seed + 1,
                progress=lambda done, total: progress(what, done, total),
                **options,
            )

        def note(name: str, traces: list[list[str]], lam: float) -> None:
            habits = token_level(REFERENCE, ALIGNED, lam, _GATE)
            measurements.append(measure(name, asked, traces, expected_habits=habits))

        def steps_of(name: str) -> list[TrainerCallback]:
            what = f"{name}: trains"
            progress(what, 0, steps)
            return [_StepCallback(lambda done: progress(what, done, steps))]

        # The pair.
        written = ask("reference", reference)
        slow = judge(asked, written)
        note("reference", written, 0)
        note("aligned", ask("aligned", aligned), 1)

        # One LoRA for all λ. Each question is asked at each λ, in batches of mixed λ.
        one = realign_dial(
            aligned,
            LambdaRange(0, max(_LAMBDAS)),
            Path(scratch),
            replace(training, learning_rate=_DIAL_LEARNING_RATE),
            _GATE,
            steps_of("one LoRA"),
        )
        lams = [lam for lam in _LAMBDAS for _ in asked]
        written = ask("one LoRA", one, len(_LAMBDAS), lam=lams, max_new_tokens=_LORA_LIMIT)
        for number, lam in enumerate(_LAMBDAS):
            note(f"λ={lam:g}", written[number * questions :][:questions], lam)

        # A second round begins with the LoRA's λ = 2 in the place of the aligned model.
        name = "λ=2, 2 rounds"
        twice = realign(one.merged(2), 2, Path(scratch), training, _GATE, steps_of(name))
        note(name, ask(name, twice), 4)

        # The dial of the fast adapter.
        dial = InRaModel.from_pretrained("miniature:reference", "miniature:fast")
        written = ask("fast", dial, lam=1.0, temperature=0.0)
        fast = judge(asked, written)
        mixed = judge(asked, ask("dial λ=0.5", dial, lam=0.5, max_new_tokens=_LIMIT))
        confidence = confidences(dial, tokenizer, asked, written)

    rows = _dial_rows(slow, mixed, fast, confidence, seed)
    picture(
        output / "pareto.png",
        {
            "the pair": measurements[:2],
            "one LoRA": measurements[2:-1],
            "two rounds": measurements[-1:],
        },
        [closed_form_curve(_GATE, highest=max(_LAMBDAS))],
    )
    figures = {
        "questions": questions,
        "steps": steps,
        "seed": seed,
        "gate": _GATE,
        "rows": [measurement.to_json() for measurement in measurements],
        "dial": [row.to_json() for row in rows],
    }
    write_json(output / "demo.json", figures)
    return measurements, rows


def _dial_rows(
    slow: JudgedAnswers,
    mixed: JudgedAnswers,
    fast: JudgedAnswers,
    confidence: NDArray[np.float64],
    seed: int,
) -> list[DialRow]:
    """Compare the settings of the fast adapter's dial with its two ends.

    Args:
        slow: The answers at λ = 0.
        mixed: Those at λ = 0.5.
        fast: Those at λ = 1.
        confidence: That of each fast answer.
        seed: Seed of the coin.
    """
    # The share of slow answers at which Route has the adaptive policy's mean tokens.
    chosen = adaptive(fast, slow, confidence, _THRESHOLD)
    share = (chosen.mean_tokens - fast.mean_tokens) / (slow.mean_tokens - fast.mean_tokens)

    settings = {
        "λ=0, slow": slow,
        "λ=0.5": mixed,
        "λ=1, fast": fast,
        f"adaptive, τ={_THRESHOLD:g}": chosen,
        f"coin, {share:.0%} slow": coin(fast, slow, min(max(share, 0.0), 1.0), seed),
    }
    return [
        DialRow(name, compare_with_ends(answers, fast, slow)) for name, answers in settings.items()
    ]


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Calls a function with the number of steps done."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(state.global_step)
