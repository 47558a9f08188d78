"""What ``flexalign adapt`` and ``flexalign bake`` do before training: read, check, and show."""

from typing import NamedTuple

from datasets import Dataset, concatenate_datasets
from rich.markup import escape
from rich.table import Table

from flexalign.cli._training import (
    StepProgress,
    plan_steps,
    read_traces,
    sample_rows,
    show_samples,
)
from flexalign.cli.console import as_input_errors, print_json, result_console, say
from flexalign.data import (
    Lengths,
    ThinkingTags,
    load_preferences,
    measure_lengths,
    strip_thinking,
)
from flexalign.errors import ConfigError, UnsupportedModelError
from flexalign.inra.adapter import decoder_layers
from flexalign.inra.configuration import (
    WEIGHTS_FILE,
    InRaConfig,
    check_folder,
    require_base,
)
from flexalign.lambdas import Fixed, require_range
from flexalign.models.compatibility import ModelFacts, examine, examine_pair
from flexalign.models.loading import skeleton
from flexalign.models.sources import resolve_adapter
from flexalign.models.weights import fingerprint_file
from flexalign.training import Adaptation, AdaptRecipe, BakeRecipe, Baking, Outcome
from flexalign.training.adapter_run import Run
from flexalign.training.callbacks import StopOnSignal
from flexalign.training.memory import Sizes, estimate_memory
from flexalign.training.run import Stopped


class Prepared(NamedTuple):
    """Everything about a run that needs no weights.

    Attributes:
        run: The run.
        lengths: Of its data.
        rows: Its data as prompts and completions, for showing.
        base: What is known of the base.
        sizes: Parameters of the base, and of what is trained.
        others: Parameters held beside these.
    """

    run: Run
    lengths: Lengths
    rows: Dataset
    base: ModelFacts
    sizes: Sizes
    others: int


def prepare_adaptation(recipe: AdaptRecipe, *, command: str, skip_bad_rows: bool) -> Prepared:
    """Read and check everything that an adapter's training needs, but weights."""
    with as_input_errors():
        base = _examine_base(recipe.base)
        layers = recipe.adapter_layers
        if recipe.adapter is not None:
            layers = _adapter_settings(recipe.base, recipe.adapter, base).adapter_layers
        total, layer = _count(base)
        others, prints = 0, [base.fingerprint]
        if recipe.adapter is not None:
            prints.append(_file_fingerprint(recipe.adapter))
        if recipe.aligned is not None:
            facts = examine_pair(recipe.base, recipe.aligned)
            facts.require_fit()
            others = _count(facts.aligned)[0]
            prints.append(facts.aligned.fingerprint)
    data, rows = _read_data(recipe, base, skip_bad_rows=skip_bad_rows)
    arguments = recipe.training_arguments()
    lengths = measure_lengths(rows, base.tokenizer, arguments.max_length)
    run = Adaptation(recipe, data, base.tokenizer, models=prints, command=command, say=say)
    return Prepared(run, lengths, rows, base, Sizes(total, layers * layer), others)


def prepare_baking(
    recipe: BakeRecipe,
    *,
    command: str,
    skip_bad_rows: bool,
    lambda_range: tuple[float, float] | None = None,
) -> Prepared:
    """Read and check everything that a baking needs, but weights.

    Args:
        recipe: What is baked.
        command: The command that started it.
        skip_bad_rows: Leave out rows that cannot be used.
        lambda_range: Where λ may lie; the adapter's own range if not given.
    """
    with as_input_errors():
        base = _examine_base(recipe.base)
        settings = _adapter_settings(recipe.base, recipe.adapter, base)
        permitted = lambda_range or settings.lambda_range
        require_range(
            permitted, [(f"λ={recipe.lam:g}", Fixed(recipe.lam))], f"the adapter {recipe.adapter}"
        )
        total, layer = _count(base)
        prints = [base.fingerprint, _file_fingerprint(recipe.adapter)]
    data = read_traces(recipe.data, skip_bad_rows=skip_bad_rows)
    if len(data) < 2:
        raise ConfigError(f"{recipe.data} has one row; held_out needs at least one more.")
    arguments = recipe.training_arguments()
    lengths = measure_lengths(data, base.tokenizer, arguments.max_length)
    run = Baking(recipe, data, base.tokenizer, models=prints, command=command, say=say)
    sizes = Sizes(total, total)
    return Prepared(run, lengths, data, base, sizes, settings.adapter_layers * layer)


def preview(prepared: Prepared, *, as_json: bool) -> None:
    """Show what a run would do: two samples, the data's sizes, steps and memory."""
    run = prepared.run
    arguments, recipe = run.arguments, run.recipe
    steps, longest = plan_steps(arguments, prepared.lengths)
    need = estimate_memory(
        prepared.base.config,
        prepared.sizes,
        aligned_parameters=prepared.others,
        rows=arguments.per_device_train_batch_size,
        tokens=longest,
        chunk_size=getattr(arguments, "chunk_size", 256),
        half_precision=bool(arguments.bf16),
        checkpointing=bool(arguments.activation_checkpointing),
    )
    facts = {
        **{key: value for key, value in recipe.to_tree().items() if key != "training"},
        "data": {"path": recipe.data, **prepared.lengths.to_json()},
        **steps,
        "trained_parameters": prepared.sizes.trainable,
        "memory_gib": need.to_gib(),
        "output_state": run.state,
    }
    samples = sample_rows(prepared.rows, run.tokenizer, arguments.max_length)
    if as_json:
        print_json(facts | {"samples": samples})
        return
    show_samples(samples)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        table.add_row(name.replace("_", " "), escape(str(value)))
    result_console.print(table)


def finish(run: Run) -> Outcome:
    """Train what is left of a run, with a bar; say how to go on if a signal stops it.

    Raises:
        typer.Exit: With code 130, after a signal.
    """
    import typer

    if run.state == "done":
        say(f"{run.output} holds this run already, finished.")
    bar = StepProgress()
    try:
        return run.run([bar], StopOnSignal())
    except Stopped as stop:
        say(f"stopped after {stop.checkpoint}; give the same command again to go on from there.")
        raise typer.Exit(130) from None
    finally:
        bar.close()


def _read_data(
    recipe: AdaptRecipe, base: ModelFacts, *, skip_bad_rows: bool
) -> tuple[Dataset, Dataset]:
    """Return the data as it is trained on, and as prompts and completions."""
    if recipe.method == "dpo":
        pairs = load_preferences(recipe.data, skip_bad_rows=skip_bad_rows)
        sides = [
            pairs.select_columns(["prompt", side]).rename_column(side, "completion")
            for side in ("chosen", "rejected")
        ]
        return pairs, concatenate_datasets(sides)
    traces = read_traces(recipe.data, skip_bad_rows=skip_bad_rows)
    if recipe.strip_thinking:
        traces = strip_thinking(traces, ThinkingTags.of(base.tokenizer))
    return traces, traces


def _examine_base(name: str) -> ModelFacts:
    facts = examine(name)
    if facts.kind == "adapter":
        raise UnsupportedModelError(
            f"the base {name} is a PEFT adapter, which would be in both streams; merge it into its "
            "base first (merge_and_unload) and give the merged model."
        )
    return facts


def _adapter_settings(name: str, adapter: str, base: ModelFacts) -> InRaConfig:
    """Read an adapter's settings, and check that it is whole and made for the base."""
    folder = resolve_adapter(adapter)
    settings = check_folder(folder)
    if base.kind != "gguf" and base.fingerprint is not None:
        require_base(settings, base.fingerprint, name, folder)
    return settings


def _count(facts: ModelFacts) -> tuple[int, int]:
    """Count a model's parameters, and those of its first layer, without storage.

    Raises:
        UnsupportedModelError: If it has no stack of decoder layers.
    """
    model = skeleton(facts.config)
    layer = decoder_layers(model, facts.name)[0]
    parts = (model, layer)
    total, first = (sum(item.numel() for item in part.parameters()) for part in parts)
    return total, first


def _file_fingerprint(adapter: str) -> str:
    return fingerprint_file(resolve_adapter(adapter) / WEIGHTS_FILE)
