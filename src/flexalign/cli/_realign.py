"""What ``flexalign realign`` does before training: read, check, and show on request."""

import math
import shlex
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from rich.markup import escape
from rich.table import Table

from flexalign.cli._training import (
    plan_steps,
    read_traces,
    read_watched,
    sample_rows,
    show_samples,
)
from flexalign.cli.console import print_json, result_console, say
from flexalign.data import Lengths, measure_lengths
from flexalign.data.rendering import chat_template_of
from flexalign.data.template import replace_template
from flexalign.models.compatibility import ModelFacts, PairFacts, examine_pair
from flexalign.models.weights import tensor_infos
from flexalign.training.hidden_cache import HiddenStateCache
from flexalign.training.memory import count_parameters, estimate_memory
from flexalign.training.recipes import Recipe
from flexalign.training.run import LARGEST_EFFECTIVE_LAMBDA, Realignment, effective_lambda


class Inputs(NamedTuple):
    """What a recipe names, read and checked; no weights.

    Attributes:
        pair: What is known of the two models.
        tokenizer: Theirs, with the chat template that training is going to use.
        traces: The data.
        lengths: Of the data.
        watched: Prompts and known answers to watch; None if there are none.
    """

    pair: PairFacts
    tokenizer: Any
    traces: Dataset
    lengths: Lengths
    watched: tuple[list[Any], list[str | None]] | None

    @property
    def fingerprints(self) -> tuple[str | None, str | None]:
        """Of the reference and the aligned model."""
        return self.pair.reference.fingerprint, self.pair.aligned.fingerprint


def caution_of_distance(recipes: Sequence[Recipe]) -> str | None:
    """Say that the farthest of several runs extrapolates far, and without a gate.

    A schedule counts by its end, several rounds by what they amount to.

    Returns:
        One sentence; None if none goes beyond `LARGEST_EFFECTIVE_LAMBDA`, or there is a gate.
    """
    recipe = recipes[0]  # they differ in λ and output alone
    farthest = max(effective_lambda(each.lam, each.rounds, extrapolate=True) for each in recipes)
    if recipe.gate is not None or farthest <= LARGEST_EFFECTIVE_LAMBDA:
        return None
    told = "λ" if recipe.rounds == 1 else "an effective λ"
    command = shlex.join(
        ["flexalign", "inspect", recipe.reference, recipe.aligned, "--diff", recipe.data]
    )
    return (
        f"{told} of {farthest:g} without a gate amplifies the pair's noise as well: measured on "
        "the miniature (docs/results.md), accuracy went from 0.75 to 0.72 at λ = 5 and 0.14 at "
        "λ = 10, but with `gate: 0.01` to 0.89 and 0.92; set `gate: τ`, for which "
        f"{command} proposes a τ."
    )


def read_inputs(recipe: Recipe, *, skip_bad_rows: bool) -> Inputs:
    """Read and check everything that needs no weights."""
    arguments = recipe.training_arguments(recipe.output)
    facts = examine_pair(
        recipe.reference, recipe.aligned, trust_remote_code=arguments.trust_remote_code
    )
    facts.require_fit()
    tokenizer = _tokenizer(facts, arguments.chat_template_path)
    traces = read_traces(recipe.data, skip_bad_rows=skip_bad_rows)
    lengths = measure_lengths(traces, tokenizer, arguments.max_length)
    watched = read_watched(recipe.watch) if recipe.watch else None
    return Inputs(facts, tokenizer, traces, lengths, watched)


def make_run(
    recipe: Recipe,
    inputs: Inputs,
    *,
    command: str,
    extrapolate: bool,
    cache: Callable[[], HiddenStateCache] | None,
) -> Realignment:
    """Make a run of what was read; decides whether its output folder may be used."""
    return Realignment(
        recipe,
        inputs.traces,
        inputs.tokenizer,
        pair=inputs.fingerprints,
        command=command,
        cache=cache,
        extrapolate=extrapolate,
        say=say,
    )


def _tokenizer(facts: PairFacts, chat_template: str | None) -> Any:
    """The pair's tokenizer, with the chat template that training is going to use."""
    tokenizer = facts.tokenizer
    replace_template(tokenizer, chat_template_of(tokenizer, chat_template))
    return tokenizer


def preview(runs: Sequence[Realignment], inputs: Inputs, *, as_json: bool) -> None:
    """Show what runs would do: two samples, the data's sizes, steps and memory.

    Several differ in λ and output alone.
    """
    for warning in inputs.pair.warnings:
        warnings.warn(warning, stacklevel=1)
    run = runs[0]
    facts = _facts(run, inputs)
    if len(runs) > 1:
        facts["lambda"] = [each.recipe.lam for each in runs]
        facts["output"] = [each.recipe.output for each in runs]
        facts["output_state"] = [each.state for each in runs]
    cut = run.recipe.training_arguments(run.recipe.output).max_length
    samples = sample_rows(run.traces, run.tokenizer, cut)
    if as_json:
        print_json(facts | {"samples": samples})
        return
    show_samples(samples)
    result_console.print(_table(facts))


def _facts(run: Realignment, inputs: Inputs) -> dict[str, Any]:
    recipe, arguments = run.recipe, run.recipe.training_arguments(run.recipe.output)
    steps, longest = plan_steps(arguments, inputs.lengths)
    return {
        "reference": recipe.reference,
        "aligned": recipe.aligned,
        "lambda": recipe.lam,
        "teacher": recipe.teacher,
        "rounds": recipe.rounds,
        "effective_lambda": effective_lambda(recipe.lam, recipe.rounds, extrapolate=True),
        "output": recipe.output,
        "output_state": run.state,
        "data": {"path": recipe.data, **inputs.lengths.to_json()},
        **steps,
        **_memory(recipe, inputs.pair, longest),
    }


def _memory(recipe: Recipe, pair: PairFacts, longest: int) -> dict[str, Any]:
    arguments = recipe.training_arguments(recipe.output)
    config = pair.reference.config
    sizes = count_parameters(config, recipe.peft_config())
    need = estimate_memory(
        config,
        sizes,
        aligned_parameters=_parameters(pair.aligned),
        cached_heads=(1 if pair.shared_base else 2) if recipe.teacher == "cached" else None,
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
