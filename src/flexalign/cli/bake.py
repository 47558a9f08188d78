"""``flexalign bake``: turn one setting of a dial into a plain model."""

import shlex
from typing import Annotated

import typer
from rich.markup import escape

from flexalign.cli.console import console, print_json
from flexalign.cli.options import (
    Assignments,
    DryTraining,
    PermittedRange,
    Private,
    PushTo,
    Recipe,
    RecipeOutput,
    ResultAsJson,
    SkipBadRows,
    parse_lambda_option,
    read_range,
)
from flexalign.cli.training import planned_push, train


def bake(
    recipe: Recipe,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="Adapter's folder instead of the recipe's.")
    ] = None,
    lam: Annotated[
        str | None, typer.Option("--lambda", help="λ instead of the recipe's, a number.")
    ] = None,
    lambda_range: PermittedRange = None,
    output: RecipeOutput = None,
    assignments: Assignments = None,
    skip_bad_rows: SkipBadRows = False,
    push: PushTo = None,
    private: Private = False,
    dry_run: DryTraining = False,
    as_json: ResultAsJson = False,
) -> None:
    """Make a plain model that behaves as a dial at one λ: one stream, at the plain model's cost.

    A LoRA dial is merged into its base: give base, adapter, lambda and output alone.

    A layer adapter's setting is trained into a model: the student starts at the base and learns,
    token by token, the mixture of the dial's two streams (TrRa). How far it is from the dial is
    measured on rows held out. A recipe:

    \b
    RECIPE KEYS

    Look first: [cyan]flexalign bake recipe.yaml --dry-run[/cyan]

    Then: [cyan]flexalign bake recipe.yaml --adapter out/fast --lambda 0.5[/cyan]
    """
    limits = read_range(lambda_range)
    from flexalign.training.recipes import BakeRecipe

    # Errors in the recipe are raised before the training libraries load.
    plan = BakeRecipe.load(
        recipe,
        overrides=assignments or (),
        adapter=adapter,
        lam=parse_lambda_option(lam),
        output=output,
    )
    target = planned_push(push, private=private)
    from flexalign.training import adapter as library

    outcome = train(
        library.bake,
        plan,
        dry_run=dry_run,
        as_json=as_json,
        push=target,
        lambda_range=limits,
        skip_bad_rows=skip_bad_rows,
    )
    if outcome is None:
        return
    if as_json and not console.quiet:
        print_json(outcome.to_json())
    measured = outcome.measures
    console.print(f"the baked model: [bold]{escape(str(outcome.output))}[/bold]")
    if measured:  # a LoRA is merged, and equals the dial
        console.print(
            f"divergence to the dial, held out: {measured['held_out_divergence']:.4g} nats per "
            f"token (the base's own: {measured['held_out_divergence_of_base']:.4g})"
        )
    console.print(
        f"next: [cyan]flexalign inspect {escape(shlex.quote(str(outcome.output)))}[/cyan]",
        soft_wrap=True,
    )
