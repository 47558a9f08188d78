"""``flexalign adapt``: train a layer adapter, the dial's other end."""

import shlex
from typing import Annotated

import typer
from rich.markup import escape

from flexalign.cli.console import console, print_json
from flexalign.cli.options import (
    Assignments,
    ByID,
    DryTraining,
    Private,
    PushTo,
    Recipe,
    RecipeOutput,
    ResultAsJson,
    SkipBadRows,
    parse_lambda_option,
)
from flexalign.cli.training import planned_push, train


def adapt(
    recipe: Recipe,
    method: Annotated[
        str | None, typer.Option("--method", help="sft, dpo or trra instead of the recipe's.")
    ] = None,
    lam: Annotated[
        str | None,
        typer.Option("--lambda", help="Method trra: λ, a number or a JSON schedule."),
    ] = None,
    output: RecipeOutput = None,
    assignments: Assignments = None,
    strip_thinking: Annotated[
        bool,
        typer.Option("--strip-thinking", help="Train on what follows the thinking alone."),
    ] = False,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Method trra: allow λ < 0.")
    ] = False,
    by_id: ByID = False,
    skip_bad_rows: SkipBadRows = False,
    push: PushTo = None,
    private: Private = False,
    dry_run: DryTraining = False,
    as_json: ResultAsJson = False,
) -> None:
    """Train a layer adapter (InRa): one more layer in front of a base that stays as it is.

    λ = 0 is then the base, λ = 1 the base with the adapter. A recipe is a YAML file:

    \b
    RECIPE KEYS

    Look first: [cyan]flexalign adapt recipe.yaml --dry-run[/cyan]

    Then: [cyan]flexalign adapt recipe.yaml --strip-thinking --set training.max_steps=100[/cyan]

    Ctrl-C saves a checkpoint at the end of the step; the same command goes on from there.
    """
    from flexalign.training.recipes import AdaptRecipe

    # Errors in the recipe are raised before the training libraries load.
    plan = AdaptRecipe.load(
        recipe,
        overrides=assignments or (),
        method=method,
        lam=parse_lambda_option(lam),
        output=output,
        strip_thinking=strip_thinking or None,
        by_id=by_id or None,
    )
    target = planned_push(push, private=private)
    from flexalign.training import adapter as library

    outcome = train(
        library.adapt,
        plan,
        dry_run=dry_run,
        as_json=as_json,
        push=target,
        extrapolate=extrapolate,
        skip_bad_rows=skip_bad_rows,
    )
    if outcome is None:
        return
    if as_json and not console.quiet:
        print_json(outcome.to_json() | {"trained_parameters": outcome.trained_parameters})
    console.print(f"the adapter: [bold]{escape(str(outcome.output))}[/bold]")
    base, folder = shlex.quote(plan.base), shlex.quote(str(outcome.output))
    console.print(
        f"next: [cyan]flexalign calibrate {escape(base)} --adapter {escape(folder)} --task "
        "questions.jsonl[/cyan]\n"
        f"a look: [cyan]flexalign generate {escape(base)} QUESTION --adapter {escape(folder)} "
        "--lambda 0,0.5,1[/cyan]",
        soft_wrap=True,
    )
