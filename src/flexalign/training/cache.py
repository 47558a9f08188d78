"""The cache of hidden states of a recipe: its size, and filling and opening it."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from flexalign._storage import free_bytes
from flexalign.data import data_fingerprint
from flexalign.errors import ConfigError
from flexalign.models.compatibility import GIB
from flexalign.models.hub import check_before_download, downloads_wait
from flexalign.models.pair import ModelPair
from flexalign.training.events import Events
from flexalign.training.hidden_cache import (
    Form,
    HiddenStateCache,
    hidden_width,
    identity_of,
    prepare_documents,
    stored_dtype,
    write_cache,
)
from flexalign.training.inputs import Inputs, read_inputs
from flexalign.training.models import running_dtype
from flexalign.training.plan import plan_steps
from flexalign.training.recipes import RealignRecipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fill_cache(
    recipe: str | Path | Mapping[str, Any] | RealignRecipe,
    *,
    dtype: str = "auto",
    anyway: bool = False,
    data: Dataset | None = None,
    skip_bad_rows: bool = False,
    events: Events | None = None,
) -> HiddenStateCache:
    """Run both models of a recipe over its data once and store their final hidden states.

    ``realign`` with ``teacher: cached`` trains from them, at any λ. It finds them in the recipe's
    `cache_dir`. Complete files of an earlier call are kept.

    Args:
        recipe: As `realign` takes it; it may leave out λ, which the hidden states do not depend on.
        dtype: The dtype of stored hidden states: ``float32``, ``bfloat16``, ``float16`` or
            ``auto``. The latter is that of an unfinished cache, else the one the models run in.
        anyway: Write even if the disk's free space is too small.
        data: Rows in memory, instead of those that the recipe names.
        skip_bad_rows: Leave out rows that cannot be used.
        events: Receives progress and warnings.

    Returns:
        The open cache.

    Raises:
        ConfigError: If the folder holds another cache, there is no room, or the models have no
            fingerprints.
        CheckpointError: If the folder cannot be written to.
    """
    first = _read_recipe(recipe)
    inputs = check_before_download(
        lambda: read_inputs(first, skip_bad_rows=skip_bad_rows, data=data)
    )
    return cache_filler(first, inputs, events or Events(), dtype=dtype, anyway=anyway)()


def plan_cache(
    recipe: str | Path | Mapping[str, Any] | RealignRecipe,
    *,
    dtype: str = "auto",
    data: Dataset | None = None,
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """Return the size of a recipe's cache and the free space, without reading weights.

    Args:
        recipe: As in `fill_cache`.
        dtype: As in `fill_cache`.
        data: As in `fill_cache`.
        skip_bad_rows: As in `fill_cache`.
    """
    first = _read_recipe(recipe)
    with downloads_wait() as waiting:
        inputs = read_inputs(first, skip_bad_rows=skip_bad_rows, data=data)
    form = _form(first, inputs, dtype)
    folder = Path(first.cache_folder)
    size = inputs.lengths.response_tokens * form.token_bytes + form.head_bytes
    return {
        "cache": str(folder),
        "response_tokens": inputs.lengths.response_tokens,
        "bytes_per_token": form.token_bytes,
        "dtype": str(form.dtype).removeprefix("torch."),
        "head_gib": round(form.head_bytes / GIB, 4),
        "gib": round(size / GIB, 4),
        "free_gib": round(free_bytes(folder) / GIB, 4),
        "epochs": plan_steps(first.arguments, inputs.lengths)[0]["epochs"],
        **({"downloads": waiting.sizes} if waiting.sizes else {}),
    }


def _read_recipe(recipe: str | Path | Mapping[str, Any] | RealignRecipe) -> RealignRecipe:
    """Return the recipe of a cache, with any λ.

    Raises:
        ConfigError: If nothing could be trained from its cache, or as in `RealignRecipe.load`.
    """
    first = RealignRecipe.each(recipe, needs_lambda=False)[0]
    try:
        RealignRecipe.parse(first.to_tree() | {"teacher": "cached"})
    except ConfigError as error:
        raise ConfigError(f"no run of this recipe can read a cache: {error}") from error
    return first


def cache_filler(
    recipe: RealignRecipe,
    inputs: Inputs,
    events: Events,
    *,
    dtype: str = "auto",
    anyway: bool = False,
) -> Callable[[], HiddenStateCache]:
    """Return a function that writes missing files of a recipe's cache and opens it.

    The function does this only in its first call, and returns the same cache in all later ones.

    Args:
        recipe: The recipe, which names pair, data and folder.
        inputs: The models and data of the recipe, as `read_inputs` returns them.
        events: Receives progress and warnings.
        dtype: As in `fill_cache`.
        anyway: As in `fill_cache`.

    Raises:
        ConfigError: If a model has no fingerprint.
    """
    args = recipe.arguments
    if None in inputs.fingerprints:
        raise ConfigError(
            "a cache knows its pair by fingerprints, which pickled weights have none of; load and "
            "save the models once as safetensors (save_pretrained)."
        )

    def load_pair() -> ModelPair:
        pair = ModelPair.load(
            *recipe.models,
            dtype=running_dtype(args),
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
            prompted=inputs.pair_rows is not None,
            by_id=recipe.by_id,
        )
        for model in (pair.reference, pair.aligned):
            model.to(args.device)
        return pair

    @functools.cache
    def fill() -> HiddenStateCache:
        tokens = inputs.lengths.response_tokens
        steps, _ = plan_steps(args, inputs.lengths)
        if steps["epochs"] < 1:
            events.note(
                f"the {steps['steps']:,} steps of a run see {steps['epochs']:.0%} of the "
                "rows, and the cache holds all; fewer rows would do."
            )

        data = data_fingerprint(inputs.traces)
        with events.filling(tokens) as show:
            cache = write_cache(
                Path(recipe.cache_folder),
                identity_of(inputs.fingerprints, data, inputs.tokenizer, args, inputs.pair_rows),
                lambda: prepare_documents(inputs.traces, inputs.tokenizer, args, inputs.pair_rows),
                load_pair,
                form=_form(recipe, inputs, dtype),
                anyway=anyway,
                say=events.say,
                progress=lambda done, total: show(done),
            )
            show(tokens)  # equal rows are written once, so the progress may end below the total
        return cache

    return fill


def _form(recipe: RealignRecipe, inputs: Inputs, dtype: str) -> Form:
    running = running_dtype(recipe.arguments)
    begun = stored_dtype(Path(recipe.cache_folder))
    facts = inputs.pair
    return Form(
        widths=(hidden_width(facts.reference.config), hidden_width(facts.aligned.config)),
        vocab_size=facts.require_fit(),
        shared_head=facts.shared_base or facts.one_model,
        dtype=_DTYPES.get(dtype) or begun or running,
        head_dtype=running,
    )
