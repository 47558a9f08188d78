"""The model card of a trained model or adapter: its settings, its origin, and its use."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from flexalign.training.recipes import AdaptRecipe, BakeRecipe, RealignRecipe, Recipe

_PACKAGES = ("flexalign", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def versions_in_use() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run depends on."""
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
    curve: Sequence[Mapping[str, Any]] = (),
    round_number: int = 1,
    effective: float | None = None,
) -> str:
    """Return the text of the card: Markdown with the Hub's YAML header.

    Args:
        recipe: The run's recipe.
        command: The command line, as one line.
        facts: More about the run: ``steps`` and ``data``; for a realignment ``pair`` and
            ``tokens_seen``; for other runs ``models`` (fingerprints) and ``measures``.
        curve: Rows of ``curve.jsonl``.
        round_number: The round of a realignment whose result this is.
        effective: The effective λ of the rounds up to this one.
    """
    if isinstance(recipe, RealignRecipe):
        content = _realigned(recipe, facts, round_number, effective)
    elif isinstance(recipe, AdaptRecipe):
        content = _adapter(recipe, facts)
    elif isinstance(recipe, BakeRecipe):
        content = _baked(recipe, facts)
    else:
        raise TypeError(f"there is no card of a {type(recipe).__name__}")

    header = {
        "library_name": content.library,
        "pipeline_tag": "text-generation",
        "tags": ["flexalign", *content.tags],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        content.text,
        table(("setting", "value"), content.settings),
        *_curve_section(curve),
        f"## Made by\n\n```sh\n{command}\n```\n\nwith\n\n```yaml\n{recipe.to_yaml()}```",
        "## Versions",
        table(("package", "version"), list(versions_in_use().items())),
        f"## Use\n\n```python\n{content.usage}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def code(value: object) -> str:
    """Write a value as code, in Markdown."""
    return f"`{value}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# The parts that differ between the kinds of runs.

_REALIGNED_TEXT = """\
# A realigned language model

The student of a training-time realignment (TrRa, arXiv 2506.12704): started at the reference, it \
learned the token distribution `softmax(λ·aligned + (1−λ)·reference)` over the two models' logits."""

_DIAL_TEXT = """\
# A LoRA whose strength is λ

One LoRA for every λ of a range, from a training-time realignment (TrRa, arXiv 2506.12704): with its \
strength at λ it learned the token distribution `softmax(λ·aligned + (1−λ)·reference)` over the two \
models' logits. λ = 0 is the reference exactly; PEFT loads the folder at strength 1, which is λ = 1."""

_ADAPTER_TEXT = """\
# A layer adapter with a dial

The adapter of an inference-time realignment (InRa, arXiv 2506.12704): copies of the base's first
layer, started at the identity and trained while everything else stayed frozen. λ = 0 is the base,
λ = 1 the base with the adapter, anything else the mixture of their logits."""

_BAKED_TEXT = """\
# A dial's setting as a plain model

The student of a distillation from an InRa dial (arXiv 2506.12704) at one λ: it runs as any model
does, with one stream. Divergences are in nats per token, to the dial, on rows held out."""

_MERGED_TEXT = """\
# A dial's setting as a plain model

A LoRA whose strength is λ, merged into its base at one λ: it runs as any model does, and equals the \
dial at that λ up to the rounding of the weights."""

_METHODS = {
    "sft": "supervised fine-tuning on responses",
    "dpo": "direct preference optimisation against the base stream",
    "trra": "TrRa: towards the fusion of base and aligned model",
}


@dataclass(frozen=True)
class _Content:
    """The parts of a card that depend on the kind of run."""

    library: str
    tags: tuple[str, ...]
    text: str
    settings: list[tuple[str, str]]
    usage: str


def _realigned(
    recipe: RealignRecipe, facts: Mapping[str, Any], round_number: int, effective: float | None
) -> _Content:
    divergences = {
        "reverse": "reverse, KL(student‖teacher)",
        "forward": "forward, KL(teacher‖student)",
        "jsd": f"Jensen–Shannon, β={recipe.beta:g}",
    }
    rounds = []
    if recipe.rounds > 1:
        rounds = [("round", f"{round_number} of {recipe.rounds}; effective λ {effective:g}")]

    settings = [
        ("reference (λ=0)", code(recipe.sides[0])),
        ("aligned (λ=1)", code(recipe.sides[1])),
        *_asked(recipe),
        ("λ", _lambda_of(recipe)),
        *rounds,
        ("divergence", divergences[recipe.divergence]),
        ("gate τ", "off" if recipe.gate is None else f"{recipe.gate:g}"),
        ("student", "LoRA " + code(recipe.lora) if recipe.lora else "all weights"),
        ("steps", f"{facts['steps']}"),
        ("tokens seen, without padding", f"{facts['tokens_seen']:,}"),
        ("data", f"{code(recipe.data)}, fingerprint {code(facts['data'])}"),
        ("fingerprints of the pair", ", ".join(map(code, facts["pair"]))),
    ]

    if recipe.lambda_range is not None:
        usage = (
            "from flexalign import LoRADial\n\n"
            f'model = LoRADial.from_pretrained("{recipe.models[0]}", "this-folder")\n'
            f"model.generate(**inputs, lam={recipe.lambda_range.at(0.5):g})"
        )
        return _Content("peft", ("realignment", "trra", "lora-dial"), _DIAL_TEXT, settings, usage)

    usage = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this-folder")'
        f"{'  # needs peft installed' if recipe.lora else ''}\n"
        'tokenizer = AutoTokenizer.from_pretrained("this-folder")'
    )
    library = "peft" if recipe.lora else "transformers"
    return _Content(library, ("realignment", "trra"), _REALIGNED_TEXT, settings, usage)


def _asked(recipe: RealignRecipe) -> list[tuple[str, str]]:
    """Return how a student of two prompts is asked: as the reference is."""
    if recipe.prompts is None:
        return []
    prompt = recipe.prompts.reference
    told = [f"system message {code(text)}" for text in (recipe.system, prompt.system) if text]
    arguments = {**(recipe.template or {}), **prompt.template}
    told += [f"template arguments {code(arguments)}"] if arguments else []
    return [("ask it with", ", ".join(told) or "no prompt of its own, as the reference")]


def _lambda_of(recipe: RealignRecipe) -> str:
    asked = recipe.lambda_range
    if asked is None:
        return code(recipe.lam)
    return f"every λ from {asked.low:g} to {asked.high:g}; each row of a step drew its own"


def _adapter(recipe: AdaptRecipe, facts: Mapping[str, Any]) -> _Content:
    settings = [("base", code(recipe.base)), ("method", _METHODS[recipe.method])]
    if recipe.method == "trra":
        settings += [
            ("aligned (λ=1)", code(recipe.aligned)),
            ("λ of the teacher", code(recipe.lam)),
            ("divergence", recipe.divergence),
        ]

    if recipe.adapter is not None:
        settings += [("started at", code(recipe.adapter))]
    else:
        answers = "answers, their thinking left out"
        settings += [
            ("adapter layers", str(recipe.adapter_layers)),
            ("trained on", answers if recipe.strip_thinking else "whole responses"),
        ]

    usage = (
        "from flexalign import InRaModel\n\n"
        f'model = InRaModel.from_pretrained("{recipe.base}", "this-folder")\n'
        "model.generate(**inputs, lam=0.5)"
    )
    settings += _run_of_adapter(recipe, facts)
    return _Content("flexalign", ("realignment", "inra"), _ADAPTER_TEXT, settings, usage)


def _baked(recipe: BakeRecipe, facts: Mapping[str, Any]) -> _Content:
    is_merged = "data" not in facts
    prints = ("fingerprints of the models", ", ".join(map(code, facts["models"])))
    settings = [
        ("base", code(recipe.base)),
        ("adapter", code(recipe.adapter)),
        ("λ", f"{recipe.lam:g}"),
        *([prints] if is_merged else _run_of_adapter(recipe, facts)),
    ]
    usage = (
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this-folder")'
    )
    text = _MERGED_TEXT if is_merged else _BAKED_TEXT
    tags = ("realignment", "lora-dial" if is_merged else "inra")
    return _Content("transformers", tags, text, settings, usage)


def _run_of_adapter(recipe: Recipe, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("steps", f"{facts['steps']}"),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in facts["measures"].items()),
        ("data", f"{code(recipe.data)}, fingerprint {code(facts['data'])}"),
        ("fingerprints of the models", ", ".join(map(code, facts["models"]))),
    ]


# The curve: measurements of the student's answers during training.


def _curve_section(curve: Sequence[Mapping[str, Any]]) -> list[str]:
    if not curve:
        return []
    note = (
        f"Over {curve[-1]['prompts']} prompts; step 0 is the untrained student, brackets are "
        "95 % intervals."
    )
    learned = ["## While it learned", _curve_table(curve, "step"), note]
    if "lambda" not in curve[-1]:
        return learned

    # The reference was measured before step 0, every other λ after the last step.
    last = curve[-1]["step"]
    rows = [row for row in curve if row["step"] == last]
    at_zero = [row for row in curve if row["step"] == 0 and row["lambda"] == 0 and last != 0]
    by_lambda = sorted([*at_zero, *rows], key=lambda row: float(row["lambda"]))
    return ["## The curve over λ", _curve_table(by_lambda, "lambda"), *learned]


def _curve_table(curve: Sequence[Mapping[str, Any]], first: str) -> str:
    graded = any("accuracy" in row for row in curve)
    keys = [first] if first == "lambda" or "lambda" not in curve[-1] else [first, "lambda"]
    head = ["λ" if key == "lambda" else key for key in keys]
    head += ["tokens per answer", "truncated", *(["accuracy"] if graded else [])]
    rows = [
        [
            *(f"{row[key]:.12g}" for key in keys),
            _with_interval(row["tokens"], row["tokens_ci"], "{:.1f}"),
            f"{row['truncated']:.1%}",
            *([_with_interval(row["accuracy"], row["accuracy_ci"], "{:.3f}")] if graded else []),
        ]
        for row in curve
    ]
    return table(head, rows)


def _with_interval(value: float, bounds: Sequence[float], form: str) -> str:
    low, high = (form.format(bound) for bound in bounds)
    return f"{form.format(value)} [{low}, {high}]"
