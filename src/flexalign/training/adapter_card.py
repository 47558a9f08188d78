"""The card of an adapter, and of a baked model: what it is, and how to make and use it."""

from collections.abc import Mapping
from typing import Any

import yaml

from flexalign.training.adapter_recipes import AdaptRecipe, BakeRecipe
from flexalign.training.card import code, table, versions_in_use

_METHODS = {
    "sft": "supervised fine-tuning on responses",
    "dpo": "direct preference optimisation against the base stream",
    "trra": "TrRa: towards the fusion of base and aligned model",
}


def training_card(
    recipe: AdaptRecipe | BakeRecipe, *, command: str, facts: Mapping[str, Any]
) -> str:
    """Write the card, in Markdown with the Hub's YAML header.

    Args:
        recipe: What was run.
        command: The command line, as one line.
        facts: ``steps``, ``measures``, ``models`` (fingerprints) and ``data``.
    """
    adapter = isinstance(recipe, AdaptRecipe)
    header = {
        "library_name": "flexalign" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["flexalign", "realignment", "inra"],
    }
    settings = [
        ("base", code(recipe.base)),
        *(_of_adapter(recipe) if isinstance(recipe, AdaptRecipe) else _of_baked(recipe)),
        ("steps", f"{facts['steps']}"),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in facts["measures"].items()),
        ("data", f"{code(recipe.data)}, fingerprint {code(facts['data'])}"),
        ("fingerprints of the models", ", ".join(map(code, facts["models"]))),
    ]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        _ADAPTER_TEXT if adapter else _BAKED_TEXT,
        table(("setting", "value"), settings),
        f"## Made by\n\n```sh\n{command}\n```\n\nwith\n\n```yaml\n{recipe.to_yaml()}```",
        "## Versions\n\n" + table(("package", "version"), list(versions_in_use().items())),
        (_ADAPTER_USE if adapter else _BAKED_USE).replace("BASE", recipe.base),
    ]
    return "\n\n".join(parts) + "\n"


def _of_adapter(recipe: AdaptRecipe) -> list[tuple[str, str]]:
    rows = [("method", _METHODS[recipe.method])]
    if recipe.method == "trra":
        rows += [("aligned (λ=1)", code(recipe.aligned)), ("λ of the teacher", code(recipe.lam))]
        rows += [("divergence", recipe.divergence)]
    if recipe.adapter is not None:
        return [*rows, ("started at", code(recipe.adapter))]
    trained_on = "answers, their thinking left out" if recipe.strip_thinking else "whole responses"
    return [*rows, ("adapter layers", str(recipe.adapter_layers)), ("trained on", trained_on)]


def _of_baked(recipe: BakeRecipe) -> list[tuple[str, str]]:
    return [("adapter", code(recipe.adapter)), ("λ", f"{recipe.lam:g}")]


_ADAPTER_TEXT = """\
# A layer adapter with a dial

The adapter of an inference-time realignment (InRa, arXiv 2506.12704): copies of the base's first
layer, started at the identity and trained while everything else stayed frozen. λ = 0 is the base,
λ = 1 the base with the adapter, anything else the mixture of their logits."""

_BAKED_TEXT = """\
# A dial's setting as a plain model

The student of a distillation from an InRa dial (arXiv 2506.12704) at one λ: it runs as any model
does, with one stream. Divergences are in nats per token, to the dial, on rows held out."""

_ADAPTER_USE = """\
## Use

```python
from flexalign import InRaModel

model = InRaModel.from_pretrained("BASE", "this-folder")
model.generate(**inputs, lam=0.5)
```"""

_BAKED_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this-folder")
```"""
