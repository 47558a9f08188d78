"""The steps of the demo: students at several λ, then one adapter's dial, with progress."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from flexalign.cli.console import console
from flexalign.inra import InRaModel
from flexalign.miniature import ALIGNED, REFERENCE, make_questions
from flexalign.miniature.closed_form import token_level
from flexalign.miniature.demo import (
    Measurement,
    Training,
    Worth,
    adaptive,
    closed_form_curve,
    coin,
    confidences,
    judge,
    load_pair,
    measure,
    picture,
    realign,
    respond,
    weigh,
)

_LEARNING_RATE = 1e-3
"""For short trainings; the results document takes half of it and more steps."""

_QUESTION_SEED = 10_000
"""Far from the seeds of training data."""

_THRESHOLD = 0.44
"""Chosen by ``benchmarks/dial.py`` on other questions."""

_LIMIT = 200
"""Tokens for the mixed dial, which may lose itself between the two ends."""


@dataclass(frozen=True)
class DialRow:
    """What one setting of the fast adapter's dial is worth.

    Attributes:
        name: What it is called in the table.
        worth: Beside the dial's two ends.
    """

    name: str
    worth: Worth

    def to_json(self) -> dict[str, Any]:
        """All fields by name; an interval is low, estimate, high."""
        return {"name": self.name, **asdict(self.worth)}


def run_demo(
    output: Path, *, questions: int, steps: int, seed: int
) -> tuple[list[Measurement], list[DialRow]]:
    """Train and measure everything that the demo shows, and write its picture and figures."""
    training = Training(steps=steps, learning_rate=_LEARNING_RATE, seed=seed)
    asked = make_questions(questions, seed=_QUESTION_SEED + seed)
    measurements: list[Measurement] = []

    with _quiet(), _progress() as progress, TemporaryDirectory() as scratch:
        reference, aligned, tokenizer = load_pair()

        def ask(name: str, model: Any, **options: Any) -> list[list[str]]:
            task = _begin(progress, f"{name}: answers", questions)
            return respond(
                model,
                tokenizer,
                asked,
                seed=seed + 1,
                progress=lambda done, _: progress.update(task, completed=done),
                **options,
            )

        def answer(name: str, model: Any, lam: float) -> list[list[str]]:
            traces = ask(name, model)
            habits = token_level(REFERENCE, ALIGNED, lam)
            measurements.append(measure(name, asked, traces, expected_habits=habits))
            return traces

        def train(name: str, towards: Any, lam: float) -> Any:
            task = _begin(progress, f"{name}: trains", steps)
            callback = _ShowSteps(progress, task)
            return realign(towards, lam, Path(scratch), training, callbacks=[callback])

        slow = judge(asked, answer("reference", reference, 0))
        answer("aligned", aligned, 1)
        answer("λ=1", train("λ=1", aligned, 1), 1)
        once = train("λ=2", aligned, 2)
        answer("λ=2", once, 2)
        answer("λ=2, 2 rounds", train("λ=2, 2 rounds", once, 2), 4)

        dial = InRaModel.from_pretrained("miniature:reference", "miniature:fast")
        written = ask("fast", dial, lam=1.0, temperature=0.0)
        fast = judge(asked, written)
        mixed = judge(asked, ask("dial λ=0.5", dial, lam=0.5, max_new_tokens=_LIMIT))
        confidence = confidences(dial, tokenizer, asked, written)

    chosen = adaptive(fast, slow, confidence, _THRESHOLD)
    share = (chosen.mean_tokens - fast.mean_tokens) / (slow.mean_tokens - fast.mean_tokens)
    settings = {
        "λ=0, slow": slow,
        "λ=0.5": mixed,
        "λ=1, fast": fast,
        f"adaptive, τ={_THRESHOLD:g}": chosen,
        f"coin, {share:.0%} slow": coin(fast, slow, min(max(share, 0.0), 1.0), seed),
    }
    rows = [DialRow(name, weigh(answers, fast, slow)) for name, answers in settings.items()]
    picture(
        output / "pareto.png",
        {"the pair": measurements[:2], "realigned": measurements[2:]},
        [closed_form_curve(highest=5)],
    )
    figures = {
        "questions": questions,
        "steps": steps,
        "seed": seed,
        "rows": [measurement.to_json() for measurement in measurements],
        "dial": [row.to_json() for row in rows],
    }
    (output / "demo.json").write_text(
        json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    return measurements, rows


class _ShowSteps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)


def _begin(progress: Progress, description: str, total: int) -> TaskID:
    """Add a bar; where bars are not drawn until the end, say what has begun."""
    if not console.is_terminal:
        console.print(description)
    return progress.add_task(description, total=total)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


@contextmanager
def _quiet() -> Iterator[None]:
    """The demo's own bars say what happens; the libraries' bars and notes would tear them apart."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
