"""The model card of a trained model or adapter: its settings, its origin, and its use."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flexalign.lora_dial.configuration import check_folder
from flexalign.models.origin import Origin, dataset_ids
from flexalign.models.sources import hub_id, resolve_adapter
from flexalign.training.recipes import AdaptRecipe, BakeRecipe, RealignRecipe, Recipe

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

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
        facts: More about the run: ``steps`` and ``data``; ``renamed``, the special tokens of a pair
            that was read by id; for a realignment ``pair`` and
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

    origin = Origin.of(content.base)
    parts = [
        f"---\n{_header(recipe, content, origin, curve)}---",
        content.text,
        table(("setting", "value"), content.settings),
        *_curve_section(curve),
        *origin.section,
        f"## Made by\n\n```sh\n{command}\n```\n\nwith\n\n```yaml\n{recipe.to_yaml()}```",
        "## Versions",
        table(("package", "version"), list(versions_in_use().items())),
        f"## Use\n\n```python\n{content.usage}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def export_card(adapter: str, folders: Sequence[str], command: str) -> str:
    """Return the card of a LoRA dial's adapters at several λ: the header, and what each folder is.

    Args:
        adapter: The dial.
        folders: The name of each adapter's folder.
        command: The command line, as one line.
    """
    origin = Origin.of(check_folder(resolve_adapter(adapter)).base or "(not named)")
    header = _as_yaml(
        origin.header("adapter"), library="peft", tags=("realignment", "trra", "lora-dial")
    )
    parts = [
        f"---\n{header}---",
        _EXPORT_TEXT,
        "\n".join(f"- {code(name)}" for name in folders),
        *origin.section,
        f"## Made by\n\n```sh\n{command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def code(value: object) -> str:
    """Write a value as code, in Markdown."""
    return f"`{value}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# The header, by which the hub links the folder.


def _header(
    recipe: Recipe, content: "_Content", origin: Origin, curve: Sequence[Mapping[str, Any]]
) -> str:
    """Return the header as YAML, in the form of huggingface_hub's ``ModelCardData``."""
    watch = recipe.watch if isinstance(recipe, RealignRecipe) else None
    return _as_yaml(
        origin.header(content.relation, content.others),
        datasets=dataset_ids(recipe.data) or None,
        library=content.library,
        tags=content.tags,
        eval_results=_results(curve, watch.prompts) if watch is not None and curve else None,
        model_name=Path(recipe.output).name,
    )


def _as_yaml(origin: Mapping[str, Any], *, library: str, tags: Sequence[str], **others: Any) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        **origin,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["flexalign", *tags],
        **others,
    )
    values: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    values.pop("model_name", None)  # a part of `model-index` alone
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _results(curve: Sequence[Mapping[str, Any]], prompts: str) -> "list[EvalResult]":
    """Return the measurements after training as the results of ``model-index``."""
    from huggingface_hub import EvalResult

    name = Path(prompts).name
    results = []
    for row in _measured_last(curve):
        at = f" at λ = {row['lambda']:.12g}" if "lambda" in row else ""
        figures = {"tokens": "tokens per answer", "truncated": "share of answers cut off"}
        if "accuracy" in row:
            figures = {"accuracy": "accuracy", **figures}
        results += [
            EvalResult(
                task_type="text-generation",
                dataset_type=Path(prompts).stem,
                dataset_name=f"{name}, its first {row['prompts']} prompts",
                metric_type=key,
                metric_value=row[key],
                metric_name=f"{meaning}{at}",
                metric_args={"lambda": row["lambda"]} if "lambda" in row else None,
            )
            for key, meaning in figures.items()
        ]
    return results


def _measured_last(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the trained student; of a dial one for each λ, in order.

    The reference, λ = 0, was measured before step 0, every other λ after the last step.
    """
    last = curve[-1]["step"]
    rows = [row for row in curve if row["step"] == last]
    if "lambda" not in curve[-1]:
        return rows
    at_zero = [row for row in curve if row["step"] == 0 and row["lambda"] == 0 and last != 0]
    return sorted([*at_zero, *rows], key=lambda row: float(row["lambda"]))


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

_EXPORT_TEXT = """\
# A LoRA dial at several λ

Plain PEFT adapters, one for each λ, of one LoRA whose strength is λ (TrRa, arXiv 2506.12704). Load
one with PEFT's `subfolder`, or serve all by name with any engine that serves LoRA."""

_METHODS = {
    "sft": "supervised fine-tuning on responses",
    "dpo": "direct preference optimisation against the base stream",
    "trra": "TrRa: towards the fusion of base and aligned model",
}


@dataclass(frozen=True)
class _Content:
    """The parts of a card that depend on the kind of run.

    Attributes:
        base: The model that the result was made from.
        relation: What it is to that model, as the hub has it.
        others: Ids at the hub of further models that it was made from.
    """

    base: str
    relation: str
    library: str
    tags: tuple[str, ...]
    text: str
    settings: list[tuple[str, str]]
    usage: str
    others: tuple[str, ...] = ()


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
        *_read_by_id(facts),
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

    tags = ("trl", "realignment", "trra")
    if recipe.lambda_range is not None:
        usage = (
            "from flexalign import LoRADial\n\n"
            f'model = LoRADial.from_pretrained("{recipe.models[0]}", "this-folder")\n'
            f"model.generate(**inputs, lam={recipe.lambda_range.at(0.5):g})"
        )
        own = (*tags, "lora-dial")
        return _Content(recipe.models[0], "adapter", "peft", own, _DIAL_TEXT, settings, usage)

    usage = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this-folder")'
        f"{'  # needs peft installed' if recipe.lora else ''}\n"
        'tokenizer = AutoTokenizer.from_pretrained("this-folder")'
    )
    relation, library = ("adapter", "peft") if recipe.lora else ("finetune", "transformers")
    return _Content(recipe.models[0], relation, library, tags, _REALIGNED_TEXT, settings, usage)


def _asked(recipe: RealignRecipe) -> list[tuple[str, str]]:
    """Return how a student of two prompts is asked: as the reference is."""
    if recipe.prompts is None:
        return []
    prompt = recipe.prompts.reference
    told = [f"system message {code(text)}" for text in (recipe.system, prompt.system) if text]
    arguments = {**(recipe.template or {}), **prompt.template}
    told += [f"template arguments {code(arguments)}"] if arguments else []
    return [("ask it with", ", ".join(told) or "no prompt of its own, as the reference")]


def _read_by_id(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return which special tokens were taken for the same in spite of their names."""
    if "renamed" not in facts:
        return []
    names = [
        f"{token['id']} {code(token['reference'])}, {code(token['aligned'])}"
        for token in facts["renamed"]
    ]
    return [("special tokens read by id: reference, aligned", "; ".join(names).replace("|", "\\|"))]


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
            *_read_by_id(facts),
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
    tags = ("trl", "realignment", "inra")
    return _Content(recipe.base, "adapter", "flexalign", tags, _ADAPTER_TEXT, settings, usage)


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
    tags: tuple[str, ...] = ("realignment", "lora-dial" if is_merged else "inra")

    # A merge, to the hub, is of several models; without the LoRA's id there is one to name.
    merged = hub_id(recipe.adapter) if is_merged else None
    others = () if merged is None else (merged,)
    relation = "merge" if others else "finetune"
    if not is_merged:
        tags = ("trl", *tags)
    return _Content(recipe.base, relation, "transformers", tags, text, settings, usage, others)


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

    by_lambda = _measured_last(curve)
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
