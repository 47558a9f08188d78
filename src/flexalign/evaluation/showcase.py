"""Realign the miniature and hold the students against its closed form.

What ``flexalign demo`` shows in minutes and the results document in full: students at several λ,
what each buys in accuracy and tokens, and how near its habits are to those of equation 5.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from flexalign.decoding.responses import generate_responses
from flexalign.evaluation.pareto import ParetoCurve, ParetoPoint, draw_pareto
from flexalign.evaluation.statistics import clustered_interval
from flexalign.loading import load_model, load_tokenizer
from flexalign.miniature import ALIGNED, REFERENCE, folder, make_traces
from flexalign.miniature.closed_form import Outcome, expected_outcome, token_level
from flexalign.miniature.measure import count_branches, is_right, mean_habits, split_trace
from flexalign.miniature.world import Habits, Question
from flexalign.trra import TrRaConfig, TrRaTrainer

__all__ = [
    "LONGEST_RESPONSE",
    "Measurement",
    "Training",
    "closed_form_curve",
    "load_pair",
    "measure",
    "picture",
    "realign",
    "respond",
]

LONGEST_RESPONSE = 1000
"""Tokens; far beyond what the reference ever writes, so that nothing is cut off."""


@dataclass(frozen=True)
class Training:
    """How a student is trained in the miniature.

    Attributes:
        steps: Optimizer steps of `batch_size` traces.
        learning_rate: Peak; warm-up over a tenth of the steps, then a cosine to zero.
        batch_size: Traces a step.
        divergence: As in :class:`flexalign.TrRaConfig`, like the next two.
        rollouts: Share of the batches that the student samples.
        rollout_objective: What those minimise.
        seed: Of traces and data order.
    """

    steps: int = 150
    learning_rate: float = 5e-4
    batch_size: int = 24
    divergence: str = "reverse"
    rollouts: float = 0.0
    rollout_objective: str = "token"
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """What one model does on the miniature's questions.

    Attributes:
        name: What it is called in tables.
        accuracy: Share of right answers, 0…1, and its 95 % interval.
        tokens: Mean tokens a response, and its 95 % interval.
        habits: Its habits, counted in what it wrote.
        expected: What the closed form gives.
        expected_habits: The habits behind `expected`.
    """

    name: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    tokens: float
    tokens_interval: tuple[float, float]
    habits: Habits
    expected: Outcome
    expected_habits: Habits

    def to_json(self) -> dict[str, Any]:
        """All fields by name, nested ones as dictionaries."""
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
        output: Where the trainer may write.
        training: Steps, rate and seed.
        gate: The gate τ of the teacher.
        callbacks: Told of every step.
        start: Where the student starts, changed in place; None: at the reference.
    """
    reference, _, tokenizer = load_pair()
    student = load_model(str(folder("reference"))) if start is None else start
    rows = make_traces(training.steps * training.batch_size, seed=1_000 + training.seed)
    trainer = TrRaTrainer(
        student,
        reference=reference,
        aligned=aligned,
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
    trainer.train()
    return student.eval()


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
    """Let a model answer every question once and return its traces; temperature 0 is greedy."""
    responses = generate_responses(
        model,
        tokenizer,
        [[{"role": "user", "content": question.text}] for question in questions],
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
    """Measure what sampled traces are worth and which habits they show.

    Args:
        name: What to call the model.
        questions: As many as traces.
        traces: One response to each.
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
    """Tokens and accuracy under equation 5 for λ from 0 to `highest`."""
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
    """Draw measurements, one colour a group, over the closed form's curves."""
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
