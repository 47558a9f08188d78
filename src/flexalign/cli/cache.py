"""``flexalign cache``: run both teachers once, so that students of any λ train without them."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from flexalign.cli.console import console, print_json, result_console, say
from flexalign.cli.options import (
    AlignedPrompt,
    AllowPickle,
    Assignments,
    ByID,
    Recipe,
    ReferencePrompt,
    ResultAsJson,
    SkipBadRows,
    known_dtype,
    read_side_prompts,
)
from flexalign.cli.training import ConsoleEvents, training_session


def cache(
    recipe: Recipe,
    folder: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder instead of the recipe's cache_dir."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            callback=known_dtype,
            help="What is stored: auto (what the models run in), float32, bfloat16 or float16.",
        ),
    ] = "auto",
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    by_id: ByID = False,
    assignments: Assignments = None,
    skip_bad_rows: SkipBadRows = False,
    allow_pickle: AllowPickle = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Write even if the disk seems too small.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it would take; load and write nothing.")
    ] = False,
    as_json: ResultAsJson = False,
) -> None:
    """Run both models over a recipe's data once and keep their final hidden states.

    No λ goes into them, and the recipe needs none: any λ, schedule, divergence and gate trains from
    one cache exactly as with both models in memory, and neither is loaded again.

    How large will it be? [cyan]flexalign cache recipe.yaml --dry-run[/cyan]

    Make it: [cyan]flexalign cache recipe.yaml[/cyan]

    By two processes at once: [cyan]torchrun --nproc-per-node 2 -m flexalign cache recipe.yaml[/cyan]

    Then: [cyan]flexalign realign recipe.yaml --set teacher=cached --lambda 0.5,1,1.5,2[/cyan]

    Killed, the same command goes on. A finished cache is checked, and what is damaged is made again.
    """
    from flexalign.training.recipes import RealignRecipe

    # Errors in the recipe are raised before the training libraries load.
    plan = RealignRecipe.load_each(
        recipe,
        overrides=assignments or (),
        needs_lambda=False,
        **read_side_prompts(reference_prompt, aligned_prompt),
        cache_dir=folder,
        allow_pickle=allow_pickle or None,
        by_id=by_id or None,
    )[0]
    from flexalign.training.cache import fill_cache, plan_cache

    with training_session():
        if dry_run:
            _show(plan_cache(plan, dtype=dtype, skip_bad_rows=skip_bad_rows), as_json=as_json)
            return
        try:
            found = fill_cache(
                plan,
                dtype=dtype,
                anyway=anyway,
                skip_bad_rows=skip_bad_rows,
                events=ConsoleEvents(),
            )
        except KeyboardInterrupt:
            console.print("stopped; give the same command again to go on from there.")
            raise typer.Exit(130) from None
    keys = ("documents", "tokens", "input_tokens", "bytes", "dtype", "forward_seconds")
    facts = {"cache": str(found.folder)} | {key: found.facts[key] for key in keys}
    if as_json and not console.quiet:
        print_json(facts)
    console.print(
        f"{facts['tokens']:,} response tokens of {facts['documents']:,} rows are in "
        f"[bold]{escape(facts['cache'])}[/bold], {facts['bytes'] / 2**30:.3g} GiB"
    )


def _show(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    result_console.print(
        f"{facts['response_tokens']:,} response tokens × {facts['bytes_per_token']:,} bytes "
        f"({facts['dtype']}) and the heads ({facts['head_gib']:.3g} GiB): "
        f"{facts['gib']:.3g} GiB in {escape(facts['cache'])}; {facts['free_gib']:.3g} GiB are "
        f"free. A run's steps see the rows {facts['epochs']:g} times."
    )
    if "downloads" in facts:
        from flexalign.models.hub import describe_sizes

        say(f"would download {describe_sizes(facts['downloads'])} from the hub.")
