"""The methods that are compared over a pair of the miniature: each trained, and its cells measured."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _cells import QUESTION_SEED, fused_logits, logits_of, measured, store, trained, trained_dial

BATCH_SIZE = 40
"""Responses sampled together; on one core 5000 take a third less time than by 96, the size before."""

BEYOND = 1.05
"""How far beyond its largest λ a dial is trained, whose end is learnt from one side only."""


@dataclass(frozen=True)
class Sides:
    """The two sides of a pair.

    Attributes:
        reference: The model of λ = 0.
        aligned: The model of λ = 1.
        system: The aligned side's system message, if the two sides are one model under two prompts.
        habits: The habits of the two sides, for the closed form; None for those of the two worlds.
    """

    reference: str = "miniature:reference"
    aligned: str = "miniature:aligned"
    system: str = ""
    habits: Any = None


@dataclass(frozen=True)
class Task:
    """One method under one gate and seed: what is trained, and all its settings."""

    pair: str
    method: str
    gate: float | None
    seed: int
    lams: tuple[float, ...]
    sides: Sides

    @property
    def name(self) -> str:
        gate = "plain" if self.gate is None else f"gate={self.gate:g}"
        return f"{self.pair},{self.method},{gate},seed={self.seed}"

    def cell(self, lam: float) -> str:
        """The name of a setting's file."""
        return f"{self.name},lambda={lam:g}.json"


def run(task: Task, options: dict[str, Any]) -> list[str]:
    """Train and measure what is missing of a task; return the names of its new cells."""
    import torch

    torch.set_num_threads(1)
    work = Path(options["work"])
    missing = [lam for lam in task.lams if not (work / task.cell(lam)).is_file()]
    if missing:
        for lam, model, settings, training in _MAKERS[task.method](task, missing, options):
            row = {
                "pair": task.pair,
                "method": task.method,
                "gate": task.gate,
                "seed": task.seed,
                "lambda": lam,
                "training": training,
                "batch_size": BATCH_SIZE,
            }
            row |= _answered(model, settings, lam, task, options)
            store(work / task.cell(lam), row)
    return [task.cell(lam) for lam in missing]


Made = Iterator[tuple[float, Any, dict[str, Any], dict[str, Any] | None]]
"""λ, the model, the options of its `generate`, and what its training cost."""


def _dial(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """The LoRA dial, trained once for all λ of the task; each λ is then merged."""
    folder = Path(options["work"]) / task.name
    dial, training = _lora(
        task, {"low": 0, "high": BEYOND * max(task.lams)}, task.gate, folder, options
    )
    for lam in lams:
        yield lam, dial.merged(lam), {}, training


def _scaled(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """A LoRA trained at λ = 1 alone, whose strength is then λ."""
    dial, training = _lora(task, 1.0, None, Path(options["work"]) / task.name, options)
    for lam in lams:
        yield lam, dial.merged(lam), {}, training


def _lora(task: Task, lam: Any, gate: float | None, folder: Path, options: dict[str, Any]) -> Any:
    """Train a LoRA, or load it if it was trained before; return it with what its training cost."""
    steps = options["dial_steps"]

    def train(where: Path) -> dict[str, Any]:
        return _realign(task, lam, gate, where, steps, 1.5e-3, lora=True)

    return trained_dial(task.sides.reference, folder, train)


def _students(task: Task, lams: Sequence[float], options: dict[str, Any], rounds: int = 1) -> Made:
    """A student of each λ, all weights."""
    from flexalign.models.loading import load_model

    for lam in lams:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "student"
            cost = _realign(
                task,
                lam ** (1 / rounds),
                task.gate,
                folder,
                options["steps"],
                5e-4,
                lora=False,
                rounds=rounds,
            )
            yield lam, load_model(str(folder)), {}, cost


def _rounds(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """A student of two rounds of √λ each, which amount to λ."""
    return _students(task, lams, options, rounds=2)


def _realign(
    task: Task,
    lam: Any,
    gate: float | None,
    folder: Path,
    steps: int,
    learning_rate: float,
    *,
    lora: bool,
    rounds: int = 1,
) -> dict[str, Any]:
    """Train on the task's pair; return the steps and the seconds of one core."""
    sides = task.sides
    return trained(
        folder,
        reference=sides.reference,
        aligned={"model": sides.aligned, "system": sides.system} if sides.system else sides.aligned,
        lam=lam,
        gate=gate,
        steps=steps,
        learning_rate=learning_rate,
        seed=task.seed,
        lora=lora,
        rounds=rounds,
    )


def _pair(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """Both sides, fused while they decode."""
    from flexalign import ModelPair, TwoModelDecoder

    sides = task.sides
    if sides.system:
        from flexalign.data.prompting import PromptSettings
        from flexalign.generation.two_prompts import TwoPromptDecoder
        from flexalign.models.prompted import PromptPair

        prompts = PromptPair(aligned=PromptSettings(system=sides.system))
        decoder: Any = TwoPromptDecoder.from_pretrained(sides.reference, prompts)
    else:
        decoder = TwoModelDecoder(ModelPair.load(sides.reference, sides.aligned))
    for lam in lams:
        yield lam, decoder, {"lam": lam, "gate": task.gate}, None


def _interpolated(task: Task, lams: Sequence[float], options: dict[str, Any]) -> Made:
    """The weights between the two models, and beyond the aligned one."""
    from flexalign import interpolate
    from flexalign.models.loading import load_model

    for lam in lams:
        with TemporaryDirectory() as scratch:
            folder = interpolate(
                task.sides.reference, task.sides.aligned, lam, f"{scratch}/between"
            )
            yield lam, load_model(str(folder)), {}, None


_MAKERS: dict[str, Callable[[Task, Sequence[float], dict[str, Any]], Made]] = {
    "dial": _dial,
    "pair": _pair,
    "student": _students,
    "rounds": _rounds,
    "scaled": _scaled,
    "interpolated": _interpolated,
}


def _answered(
    model: Any, settings: dict[str, Any], lam: float, task: Task, options: dict[str, Any]
) -> dict[str, Any]:
    """Answer the questions, and compare the habits with the pair's own at the same branches."""
    from flexalign.miniature import ALIGNED, REFERENCE, make_questions
    from flexalign.miniature.closed_form import token_level
    from flexalign.miniature.demo import respond
    from flexalign.models.loading import load_tokenizer

    tokenizer = load_tokenizer(task.sides.reference)
    questions = make_questions(options["questions"], QUESTION_SEED)
    habits = task.sides.habits or (REFERENCE, ALIGNED)
    return measured(
        task.method,
        questions,
        respond(model, tokenizer, questions, seed=1 + task.seed, batch_size=BATCH_SIZE, **settings),
        tokenizer=tokenizer,
        world=token_level(*habits, lam, task.gate),
        pair=_own_form(task.sides, lam, task.gate, tokenizer),
        model=None if settings else logits_of(model),
        judged=options["judged"],
    )


def _own_form(sides: Sides, lam: float, gate: float | None, tokenizer: Any) -> Any:
    """The fused logits of a pair's two sides, as a function of a batch."""
    from flexalign.miniature.measure import told
    from flexalign.models.loading import load_model

    reference = logits_of(load_model(sides.reference))
    if sides.system:
        aligned = told(reference, tokenizer, sides.system)
    else:
        aligned = logits_of(load_model(sides.aligned))
    return fused_logits(reference, aligned, lam, gate)
