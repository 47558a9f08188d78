"""What making a cache of hidden states takes on the command line: sizes, a bar, the two models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexalign.cli._realign import Inputs
from flexalign.cli._training import plan_steps
from flexalign.cli.console import note, progress_bar, say
from flexalign.data import data_fingerprint
from flexalign.errors import ConfigError
from flexalign.models.compatibility import GIB
from flexalign.models.pair import ModelPair
from flexalign.training.hidden_cache import (
    Form,
    HiddenStateCache,
    fill_cache,
    free_bytes,
    hidden_width,
    identity_of,
    prepare_documents,
    stored_dtype,
)
from flexalign.training.models import running_dtype
from flexalign.training.recipes import Recipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan_cache(recipe: Recipe, inputs: Inputs, dtype: str) -> dict[str, Any]:
    """Work out how many bytes a cache takes and how many there are; no weights are read."""
    form = _form(recipe, inputs, dtype)
    folder = Path(recipe.cache_folder)
    size = inputs.lengths.response_tokens * form.token_bytes + form.head_bytes
    return {
        "cache": str(folder),
        "response_tokens": inputs.lengths.response_tokens,
        "bytes_per_token": form.token_bytes,
        "dtype": str(form.dtype).removeprefix("torch."),
        "head_gib": round(form.head_bytes / GIB, 4),
        "gib": round(size / GIB, 4),
        "free_gib": round(free_bytes(folder) / GIB, 4),
        "epochs": plan_steps(recipe.training_arguments(recipe.output), inputs.lengths)[0]["epochs"],
    }


def cache_filler(
    recipe: Recipe, inputs: Inputs, *, dtype: str = "auto", anyway: bool = False
) -> Callable[[], HiddenStateCache]:
    """Make the function that makes what is missing of a recipe's cache and opens it, once.

    Args:
        recipe: Names pair, data and folder.
        inputs: From `read_inputs`.
        dtype: What hidden states are stored in; ``auto`` is what a cache that was begun has, else
            what the models run in.
        anyway: Write even if the disk seems too small.
    """
    args = recipe.training_arguments(recipe.output)
    if None in inputs.fingerprints:
        raise ConfigError(
            "a cache knows its pair by fingerprints, which pickled weights have none of; load and "
            "save the models once as safetensors (save_pretrained)."
        )

    def load_pair() -> ModelPair:
        pair = ModelPair.load(
            recipe.reference,
            recipe.aligned,
            dtype=running_dtype(args),
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )
        for model in (pair.reference, pair.aligned):
            model.to(args.device)
        return pair

    @functools.cache
    def fill() -> HiddenStateCache:
        form = _form(recipe, inputs, dtype)
        tokens = inputs.lengths.response_tokens
        steps, _ = plan_steps(args, inputs.lengths)
        if steps["epochs"] < 1:
            note(
                f"the {steps['steps']:,} steps of a run see {steps['epochs']:.0%} of the "
                "rows, and the cache holds all; fewer rows would do."
            )
        with progress_bar("response tokens cached", tokens) as show:
            cache = fill_cache(
                Path(recipe.cache_folder),
                identity_of(
                    inputs.fingerprints, data_fingerprint(inputs.traces), inputs.tokenizer, args
                ),
                lambda: prepare_documents(inputs.traces, inputs.tokenizer, args),
                load_pair,
                form=form,
                anyway=anyway,
                say=say,
                progress=lambda done, total: show(done),
            )
            show(tokens)  # the bar's total is before equal rows became one
        return cache

    return fill


def _form(recipe: Recipe, inputs: Inputs, dtype: str) -> Form:
    args = recipe.training_arguments(recipe.output)
    running = running_dtype(args)
    begun = stored_dtype(Path(recipe.cache_folder))
    facts = inputs.pair
    return Form(
        widths=(hidden_width(facts.reference.config), hidden_width(facts.aligned.config)),
        vocab_size=facts.require_fit(),
        shared_head=facts.shared_base,
        dtype=_DTYPES.get(dtype) or begun or running,
        head_dtype=running,
    )
