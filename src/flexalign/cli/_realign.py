"""What ``flexalign realign`` does before training: read, check, and show on request."""

import math
import warnings
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from flexalign.cli._shared import console, print_json, result_console
from flexalign.cli._training import (
    plan_steps,
    read_traces,
    read_watched,
    sample_rows,
    show_samples,
)
from flexalign.data import Lengths, measure_lengths
from flexalign.data.rendering import chat_template_of
from flexalign.errors import PairMismatchError
from flexalign.loading.weights import tensor_infos
from flexalign.pairing.examination import ModelFacts, PairFacts, examine_pair
from flexalign.trra.estimate import count_parameters, estimate_memory
from flexalign.trra.recipe import Recipe
from flexalign.trra.rounds import effective_lambda
from flexalign.trra.run import Realignment

__all__ = ["prepare", "preview"]


class Prepared(NamedTuple):
    """Everything about a run that needs no weights.

    Attributes:
        run: The run.
        pair: What is known of the two models.
        lengths: Of its data.
        watched: Prompts and known answers to watch; None if there are none.
    """

    run: Realignment
    pair: PairFacts
    lengths: Lengths
    watched: tuple[list[Any], list[str | None]] | None


def prepare(recipe: Recipe, *, command: str, extrapolate: bool, skip_bad_rows: bool) -> Prepared:
    """Read and check everything that needs no weights."""
    facts = examine_pair(recipe.reference, recipe.aligned)
    if facts.problems:
        raise PairMismatchError(
            f"{recipe.reference} and {recipe.aligned} do not fit: {' Also: '.join(facts.problems)}"
        )
    arguments = recipe.training_arguments(recipe.output)
    tokenizer = _tokenizer(facts, arguments.chat_template_path)
    traces = read_traces(recipe.data, skip_bad_rows=skip_bad_rows)
    lengths = measure_lengths(traces, tokenizer, arguments.max_length)
    run = Realignment(
        recipe,
        traces,
        tokenizer,
        pair=(facts.reference.fingerprint, facts.aligned.fingerprint),
        command=command,
        extrapolate=extrapolate,
        say=lambda line: console.print(escape(line), soft_wrap=True),
    )
    watched = read_watched(recipe.watch) if recipe.watch else None
    return Prepared(run, facts, lengths, watched)


def _tokenizer(facts: PairFacts, chat_template: str | None) -> Any:
    """The pair's tokenizer, with the chat template that training is going to use."""
    tokenizer = facts.reference.tokenizer
    if not tokenizer.chat_template and facts.aligned.tokenizer.chat_template:
        tokenizer = facts.aligned.tokenizer
    tokenizer.chat_template = chat_template_of(tokenizer, chat_template)
    return tokenizer


def preview(prepared: Prepared, *, as_json: bool) -> None:
    """Show what a run would do: two samples, the data's sizes, steps and memory."""
    for warning in prepared.pair.warnings:
        warnings.warn(warning, stacklevel=1)
    facts = _facts(prepared)
    run = prepared.run
    cut = run.recipe.training_arguments(run.recipe.output).max_length
    samples = sample_rows(run.traces, run.tokenizer, cut)
    if as_json:
        print_json(facts | {"samples": samples})
        return
    show_samples(samples)
    result_console.print(_table(facts))


def _facts(prepared: Prepared) -> dict[str, Any]:
    run, lengths = prepared.run, prepared.lengths
    recipe, arguments = run.recipe, run.recipe.training_arguments(run.recipe.output)
    steps, longest = plan_steps(arguments, lengths)
    return {
        "reference": recipe.reference,
        "aligned": recipe.aligned,
        "lambda": recipe.lam,
        "rounds": recipe.rounds,
        "effective_lambda": effective_lambda(recipe.lam, recipe.rounds, extrapolate=True),
        "output": recipe.output,
        "output_state": run.state,
        "data": {"path": recipe.data, **lengths.to_dict()},
        **steps,
    } | _memory(prepared, longest)


def _memory(prepared: Prepared, longest: int) -> dict[str, Any]:
    recipe = prepared.run.recipe
    arguments = recipe.training_arguments(recipe.output)
    config = prepared.pair.reference.config
    sizes = count_parameters(config, recipe.peft_config())
    need = estimate_memory(
        config,
        sizes,
        aligned_parameters=_parameters(prepared.pair.aligned),
        rows=arguments.per_device_train_batch_size,
        tokens=longest,
        chunk_size=arguments.chunk_size,
        half_precision=bool(arguments.bf16),
        checkpointing=bool(arguments.gradient_checkpointing),
    )
    return {"trained_parameters": sizes.trainable, "memory_gib": need.to_gib()}


def _parameters(model: ModelFacts) -> int:
    if model.kind == "adapter":
        return sum(math.prod(info.shape) for info in tensor_infos(model.source.path).values())
    return count_parameters(model.config).base


def _table(facts: dict[str, Any]) -> Table:
    data, memory = facts["data"], facts["memory_gib"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = {
        "reference, aligned": f"{facts['reference']}, {facts['aligned']}",
        "λ": f"{facts['lambda']}",
        "rows": f"{data['rows']:,}, of which {data['kept']:,} keep response tokens and "
        f"{data['truncated']:,} are shortened by the cut-off",
        "tokens": f"{data['prompt_tokens']:,} prompt, {data['response_tokens']:,} response; "
        f"rows of {data['shortest']:,} to {data['longest']:,}",
        "steps": f"{facts['steps']:,} of {facts['effective_batch']} rows, {facts['epochs']} epochs",
        "trained": f"{facts['trained_parameters']:,} parameters",
        "memory": f"about {memory['total']:.3g} GiB: "
        + ", ".join(f"{name} {size:.3g}" for name, size in memory.items() if name != "total"),
        "output": f"{facts['output']} ({facts['output_state']})",
    }
    if facts["rounds"] > 1:
        rows["λ"] += f", {facts['rounds']} rounds: effective {facts['effective_lambda']:g}"
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table
