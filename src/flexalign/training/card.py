"""The model card: what the model is, what it was made from and with, and how to make it again."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from flexalign.training.recipes import Recipe

_PACKAGES = ("flexalign", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def versions_in_use() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def model_card(
    recipe: Recipe,
    *,
    command: str,
    facts: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    round_number: int,
    effective: float,
) -> str:
    """Write the card of a realigned model, in Markdown with the Hub's YAML header.

    Args:
        recipe: What was run.
        command: The command line, as one line.
        facts: ``pair``, ``data``, ``steps``, ``tokens_seen``: more about the run.
        curve: Rows of ``curve.jsonl``.
        round_number: Which round of the recipe this model is.
        effective: The λ that the rounds so far amount to.
    """
    header = {
        "library_name": "peft" if recipe.lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["flexalign", "realignment", "trra"],
    }
    settings = [
        ("reference (λ=0)", f"`{recipe.reference}`"),
        ("aligned (λ=1)", f"`{recipe.aligned}`"),
        ("λ", code(recipe.lam)),
        ("divergence", _divergence(recipe)),
        ("gate τ", "off" if recipe.gate is None else f"{recipe.gate:g}"),
        ("student", "LoRA " + code(recipe.lora) if recipe.lora else "all weights"),
        ("steps", f"{facts['steps']}"),
        ("tokens seen, without padding", f"{facts['tokens_seen']:,}"),
        ("data", f"`{recipe.data}`, fingerprint `{facts['data']}`"),
        ("fingerprints of the pair", ", ".join(f"`{print_}`" for print_ in facts["pair"])),
    ]
    if recipe.rounds > 1:
        settings.insert(
            3, ("round", f"{round_number} of {recipe.rounds}; effective λ {effective:g}")
        )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        "# A realigned language model",
        "The student of a training-time realignment (TrRa, arXiv 2506.12704): started at the "
        "reference, it learned the token distribution `softmax(λ·aligned + (1−λ)·reference)` over "
        "the two models' logits.",
        table(("setting", "value"), settings),
        *_curve_section(curve),
        "## Made by",
        f"```sh\n{command}\n```",
        "with",
        f"```yaml\n{recipe.to_yaml()}```",
        "## Versions",
        table(("package", "version"), list(versions_in_use().items())),
        _usage(recipe),
    ]
    return "\n\n".join(parts) + "\n"


def _divergence(recipe: Recipe) -> str:
    names = {
        "reverse": "reverse, KL(student‖teacher)",
        "forward": "forward, KL(teacher‖student)",
        "jsd": f"Jensen–Shannon, β={recipe.beta:g}",
    }
    return names[recipe.divergence]


def _curve_section(curve: Sequence[Mapping[str, Any]]) -> list[str]:
    if not curve:
        return []
    graded = any("accuracy" in row for row in curve)
    head = ["step", "tokens per answer", "truncated", *(["accuracy"] if graded else [])]
    rows = [
        [
            str(row["step"]),
            _with_interval(row["tokens"], row["tokens_ci"], "{:.1f}"),
            f"{row['truncated']:.1%}",
            *([_with_interval(row["accuracy"], row["accuracy_ci"], "{:.3f}")] if graded else []),
        ]
        for row in curve
    ]
    note = (
        f"Over {curve[-1]['prompts']} prompts; step 0 is the untrained student, brackets are "
        "95 % intervals."
    )
    return ["## While it learned", table(head, rows), note]


def _with_interval(value: float, bounds: Sequence[float], form: str) -> str:
    low, high = (form.format(bound) for bound in bounds)
    return f"{form.format(value)} [{low}, {high}]"


def _usage(recipe: Recipe) -> str:
    note = "  # needs peft installed" if recipe.lora else ""
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("this-folder"){note}\n'
        'tokenizer = AutoTokenizer.from_pretrained("this-folder")\n```'
    )


def code(value: object) -> str:
    """Write a value as code, in Markdown."""
    return f"`{value}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
