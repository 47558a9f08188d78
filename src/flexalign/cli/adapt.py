"""``flexalign adapt``: train a layer adapter, the dial's other end."""

import shlex
import sys
from typing import Annotated

import typer
from rich.markup import escape

from flexalign.cli.console import console, print_json
from flexalign.cli.options import (
    Assignments,
    DryTraining,
    Recipe,
    RecipeOutput,
    ResultAsJson,
    SkipBadRows,
    parse_lambda_option,
)


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
    skip_bad_rows: SkipBadRows = False,
    dry_run: DryTraining = False,
    as_json: ResultAsJson = False,
) -> None:
    """Train a layer adapter (InRa): one more layer in front of a base that stays as it is.

    λ = 0 is then the base, λ = 1 the base with the adapter. A recipe is a YAML file:

    \b
      base: miniature                 # path or known name; no weight of it changes
      data: traces.jsonl              # prompts with responses
      output: out/fast                # one run; started again, it goes on
      method: sft                     # sft; dpo: rows of prompt, chosen, rejected;
                                      # trra: towards `aligned` at `lambda`
      strip_thinking: true            # sft, trra: learn what follows </think> alone
      adapter: null                   # an adapter to go on from
      adapter_layers: 1               # of a new one
      aligned: miniature:aligned      # trra: λ = 1
      lambda: 1.0                     # trra: a number, or a schedule
      divergence: reverse             # trra: or forward, jsd (with beta)
      gate: null                      # trra: as in realign
      training:                       # any field of trl.SFTConfig (dpo: DPOConfig)
        max_steps: 200
        learning_rate: 2.0e-5

    Look first: [cyan]flexalign adapt recipe.yaml --dry-run[/cyan]

    Then: [cyan]flexalign adapt recipe.yaml --strip-thinking --set training.max_steps=100[/cyan]

    Ctrl-C saves a checkpoint at the end of the step; the same command goes on from there.
    """
    from flexalign.training.adapter_recipes import AdaptRecipe

    plan = AdaptRecipe.load(
        recipe,
        overrides=assignments or (),
        method=method,
        lam=parse_lambda_option(lam),
        output=output,
        strip_thinking=strip_thinking or None,
    )

    from flexalign.cli._adapt import finish, prepare_adaptation, preview
    from flexalign.cli._training import require_forward_training
    from flexalign.cli.console import quieten_libraries, warnings_as_notes

    if plan.lam is not None:
        require_forward_training([plan.lam], extrapolate=extrapolate)
    quieten_libraries()
    with warnings_as_notes():
        prepared = prepare_adaptation(
            plan, command=shlex.join(["flexalign", *sys.argv[1:]]), skip_bad_rows=skip_bad_rows
        )
        if dry_run:
            preview(prepared, as_json=as_json)
            return
        outcome = finish(prepared.run)
    if as_json and not console.quiet:
        print_json(outcome.to_json() | {"trained_parameters": prepared.sizes.trainable})
    console.print(f"the adapter: [bold]{escape(str(outcome.output))}[/bold]")
    base, folder = shlex.quote(plan.base), shlex.quote(str(outcome.output))
    console.print(
        f"next: [cyan]flexalign calibrate {escape(base)} --adapter {escape(folder)} --task "
        "questions.jsonl[/cyan]\n"
        f"a look: [cyan]flexalign generate {escape(base)} QUESTION --adapter {escape(folder)} "
        "--lambda 0,0.5,1[/cyan]",
        soft_wrap=True,
    )
