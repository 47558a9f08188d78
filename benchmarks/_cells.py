"""Cells: settings of a benchmark in the miniature that are measured once, stored, and found again.

A cell is one JSON file. What is there is not made again, so that a stopped run goes on.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from flexalign.miniature.world import Habits

QUESTION_SEED = 20_000
"""Of the questions that all cells answer."""

CONFIDENCE = 0.95
BATCH_SIZE = 24
JUDGED = ("again", "check", "error")
"""The habits by which a trained model is judged."""

Logits = Callable[["Tensor", "Tensor"], "Tensor"]
"""(input_ids (B, T), attention_mask (B, T)) → logits (B, T, V)."""


def store(path: Path, row: dict[str, Any]) -> None:
    """Write a cell, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(to_json(row), encoding="utf-8")
    partial.replace(path)


def to_json(figures: Any) -> str:
    """Return figures as JSON, with null where there is none, such as for a habit that was not seen."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(figures), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_cells(work: Path) -> list[dict[str, Any]]:
    """All cells that are measured, in no particular order."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*lambda=*.json")]


def trained(
    folder: Path,
    *,
    reference: str,
    aligned: Any,
    lam: Any,
    gate: float | None,
    steps: int,
    learning_rate: float,
    seed: int,
    lora: bool,
    rounds: int = 1,
) -> dict[str, Any]:
    """Train as ``flexalign realign`` does; return the steps and the seconds of one core.

    Args:
        folder: Where the student or the LoRA is written.
        reference: The model of λ = 0.
        aligned: The model of λ = 1, as a recipe names it.
        lam: λ, as a recipe names it.
        gate: The gate; None for none.
        steps: Steps of `BATCH_SIZE` traces.
        learning_rate: Peak learning rate.
        seed: Of traces, order and initial weights.
        lora: Whether a LoRA is trained; if not, all weights are.
        rounds: Rounds of `steps` each.
    """
    from datasets import Dataset

    from flexalign import realign
    from flexalign.miniature import make_traces
    from flexalign.miniature.build import DIAL_RECIPE, sorted_by_length

    rows = sorted_by_length(make_traces(steps * BATCH_SIZE, seed=seed + 4), BATCH_SIZE, seed)
    recipe = DIAL_RECIPE | {
        "reference": reference,
        "aligned": aligned,
        "data": "miniature",
        "output": str(folder),
        "lambda": lam,
        "gate": gate,
        "rounds": rounds,
        "training": DIAL_RECIPE["training"]
        | {
            "learning_rate": learning_rate,
            "max_steps": steps,
            "warmup_steps": steps // 10,
            "seed": seed,
        },
    }
    if not lora:
        del recipe["lora"]

    start = time.process_time()
    realign(recipe, data=Dataset.from_list(rows), extrapolate=True)  # λ may be below 0
    return {"steps": rounds * steps, "cpu_seconds": time.process_time() - start}


def trained_dial(
    base: str, folder: Path, train: Callable[[Path], dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """Train a LoRA dial, or load it if it was trained before; return it with what it cost.

    Args:
        base: The dial's base.
        folder: The dial's folder; the cost is stored beside it.
        train: Trains the dial into a folder, and returns the cost.
    """
    from flexalign.lora_dial import LoRADial

    cost = folder.with_name(folder.name + ".cost.json")
    if not cost.is_file():
        store(cost, train(folder))
    dial = LoRADial.from_pretrained(base, folder)
    return dial, json.loads(cost.read_text(encoding="utf-8"))


def measured(
    name: str,
    questions: Sequence[Any],
    traces: Sequence[Sequence[str]],
    *,
    tokenizer: Any,
    world: "Habits",
    pair: Logits,
    model: Logits | None,
    judged: int,
) -> dict[str, Any]:
    """Measure a cell's answers, and compare its habits with the pair's own at the same branches.

    Args:
        name: The cell's name in tables.
        questions: The questions.
        traces: One response to each.
        tokenizer: The miniature's.
        world: The habits of the closed form.
        pair: The fusion of both sides of the pair.
        model: The model that was trained; None if it is the pair itself.
        judged: Number of questions whose responses are compared at their branches.
    """
    from flexalign.miniature.closed_form import expected_outcome
    from flexalign.miniature.demo import measure
    from flexalign.miniature.measure import branch_probabilities, mean_habits
    from flexalign.statistics import simultaneous_interval

    row = measure(name, questions, traces, world).to_json()
    few = slice(judged)
    sides = {"pair": pair} if model is None else {"pair": pair, "model": model}
    forced = branch_probabilities(sides, tokenizer, questions[few], traces[few])
    own = mean_habits(forced["pair"])
    row |= {"pair_habits": asdict(own), "pair_outcome": asdict(expected_outcome(own))}
    if model is not None:
        row["model_habits"] = asdict(mean_habits(forced["model"]))
        row["departure"] = {
            habit: simultaneous_interval(
                forced["model"][habit].values - forced["pair"][habit].values,
                forced["pair"][habit].questions,
                len(JUDGED),
                CONFIDENCE,
            )
            for habit in JUDGED
            if habit in forced["pair"]
        }
    return row


def fused_logits(reference: Logits, aligned: Logits, lam: float, gate: float | None) -> Logits:
    """The logits of equation 5 over two sides."""
    from flexalign.fusion import fuse

    return lambda ids, attention: fuse(
        reference(ids, attention), aligned(ids, attention), lam, gate
    )


def logits_of(model: Any) -> Logits:
    """A model's logits."""
    return lambda ids, attention: model(input_ids=ids, attention_mask=attention).logits
