"""``flexalign realign``: train a student to be the pair at a λ of your choice."""

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from flexalign.cli.console import console, print_json
from flexalign.cli.options import (
    AllowPickle,
    Assignments,
    DryTraining,
    Recipe,
    RecipeOutput,
    ResultAsJson,
    SkipBadRows,
    parse_lambda_option,
)

if TYPE_CHECKING:
    from flexalign.cli._several import StepClock
    from flexalign.training.run import Outcome, Realignment


def realign(
    recipe: Recipe,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda", help="λ instead of the recipe's: a number, several, or a JSON schedule."
        ),
    ] = None,
    output: RecipeOutput = None,
    assignments: Assignments = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Save a LoRA student as a plain model too, in OUTPUT/merged."),
    ] = False,
    extrapolate: Annotated[
        bool,
        typer.Option("--extrapolate", help="Allow λ < 0, and rounds beyond an effective λ of 4."),
    ] = False,
    skip_bad_rows: SkipBadRows = False,
    allow_pickle: AllowPickle = False,
    dry_run: DryTraining = False,
    as_json: ResultAsJson = False,
) -> None:
    """Train a student towards the fusion of a reference and an aligned model (TrRa).

    A recipe is a YAML file; only the first five keys are needed:

    \b
      reference: miniature:reference  # λ = 0: path or known name
      aligned: miniature:aligned      # λ = 1: or a PEFT adapter on the reference
      data: traces.jsonl              # prompts with responses (flexalign sample)
      output: out/realigned           # one run; started again, it goes on
      lambda: 2.0                     # or [1, 2], {kind: linear, start: 0, …}
      gate: null                      # 0.01: beyond 1 only where both differ
      divergence: reverse             # or forward, jsd (with beta)
      rounds: 1                       # k: TrRa-iter, each on the one before
      teacher: online                 # cached: both models run once (flexalign cache)
      lora: {r: 16}                   # of peft.LoraConfig; absent: all weights
      watch:                          # the student answers while it learns
        prompts: questions.jsonl      # rows with an answer give an accuracy too
        every_steps: 50               # also before step 0 and at the end
        limit: 32                     # only the first prompts, this many
        max_new_tokens: 512
        temperature: 1.0
        batch_size: 32
      training:                       # any field of trl.SFTConfig
        max_steps: 200
        learning_rate: 2.0e-5
        max_length: 8192

    Look first: [cyan]flexalign realign recipe.yaml --dry-run[/cyan]

    Then: [cyan]flexalign realign recipe.yaml --lambda 2 --set training.max_steps=100[/cyan]

    Several λ from one cache: [cyan]flexalign realign recipe.yaml --lambda 0.5,1,2 --set teacher=cached[/cyan]

    Ctrl-C saves a checkpoint at the end of the step; the same command goes on from there.
    """
    from flexalign.training.recipes import Recipe

    recipes = Recipe.load_each(
        recipe,
        overrides=assignments or (),
        lam=parse_lambda_option(lam),
        output=output,
        merge=merge or None,
        allow_pickle=allow_pickle or None,
    )
    from flexalign.cli._cache import cache_filler
    from flexalign.cli._realign import caution_of_distance, make_run, preview, read_inputs
    from flexalign.cli._training import require_forward_training
    from flexalign.cli.console import quieten_libraries, warnings_as_notes

    require_forward_training([each.lam for each in recipes], extrapolate=extrapolate)
    quieten_libraries()

    with warnings_as_notes():
        inputs = read_inputs(recipes[0], skip_bad_rows=skip_bad_rows)
        cached = recipes[0].teacher == "cached"
        cache = cache_filler(recipes[0], inputs) if cached else None
        runs = [
            make_run(
                each,
                inputs,
                command=shlex.join(["flexalign", *sys.argv[1:]]),
                extrapolate=extrapolate,
                cache=cache,
            )
            for each in recipes
        ]
        caution = caution_of_distance(recipes)
        if caution is not None:
            console.print(f"[yellow]caution:[/yellow] {escape(caution)}", soft_wrap=True)
        if dry_run:
            preview(runs, inputs, as_json=as_json)
            return
        outcomes, clocks = [], []
        for run in runs:
            _announce(run)
            outcome, clock = _train(run, inputs.watched)
            outcomes.append(outcome)
            clocks.append(clock)
        if len(runs) > 1:
            report = _report(runs, outcomes, clocks, cache)
    if as_json and not console.quiet:
        print_json(report if len(runs) > 1 else outcomes[0].to_json())
    for outcome in outcomes:
        _summarise(outcome, recipes[0].reference)


def _announce(run: "Realignment") -> None:
    from flexalign.training.run import effective_lambda

    recipe = run.recipe
    if run.state == "done":
        console.print(f"{escape(recipe.output)} holds this run already, finished.")
    elif recipe.rounds > 1:
        effective = effective_lambda(recipe.lam, recipe.rounds, extrapolate=True)
        console.print(f"{recipe.rounds} rounds; effective λ = λ^{recipe.rounds} = {effective:g}")


def _train(run: "Realignment", watched: Any) -> "tuple[Outcome, StepClock]":
    from flexalign.cli._several import StepClock
    from flexalign.cli._training import StepProgress, make_watcher
    from flexalign.training.callbacks import StopOnSignal
    from flexalign.training.run import Stopped

    bars: list[StepProgress] = []
    clock = StepClock()

    def callbacks(round_: Any) -> list[Any]:
        name = f"round {round_.number}" if run.recipe.rounds > 1 else "steps"
        bars.append(StepProgress(name))
        watch = run.recipe.watch
        watcher = [make_watcher(watch, watched, run.tokenizer)] if watch else []
        return [clock, *watcher, bars[-1]]

    try:
        return run.run(callbacks, StopOnSignal()), clock
    except Stopped as stop:
        console.print(
            f"stopped after {escape(str(stop.checkpoint))}; "
            "give the same command again to go on from there."
        )
        raise typer.Exit(130) from None
    finally:
        for bar in bars:
            bar.close()


def _report(
    runs: "list[Realignment]",
    outcomes: "list[Outcome]",
    clocks: "list[StepClock]",
    cache: Any,
) -> dict[str, Any]:
    from pathlib import Path

    from flexalign.cli._several import describe_costs, write_report

    folder = Path(runs[0].recipe.output).parent
    was_read = cache is not None and any(clock.steps for clock in clocks)
    report = write_report(folder, runs, outcomes, clocks, cache() if was_read else None)
    console.print(f"all in one report: [bold]{escape(str(folder / 'report.md'))}[/bold]")
    if report["cost"]:
        console.print(f"{describe_costs(report['cost'], len(runs))}. {report['cost']['how']}")
    return report


def _summarise(outcome: "Outcome", reference: str) -> None:
    console.print(f"the realigned model: [bold]{escape(str(outcome.output))}[/bold]")
    if outcome.merged:
        console.print(f"as a plain model:    {escape(str(outcome.merged))}")
    if len(outcome.curve) > 1:
        first, last = outcome.curve[0], outcome.curve[-1]
        cut = 1 - last["tokens"] / first["tokens"] if first["tokens"] else 0.0
        accuracy = (
            f", accuracy {first['accuracy']:.3f} → {last['accuracy']:.3f}"
            if "accuracy" in first and "accuracy" in last
            else ""
        )
        console.print(
            f"tokens per answer:   {first['tokens']:.1f} → {last['tokens']:.1f} "
            f"(a cut of {cut:.1%}){accuracy}"
        )
    console.print(f"its model card:      {escape(str(outcome.output / 'README.md'))}")
    before, after = (
        shlex.quote(f"{name}=model:{model}")
        for name, model in (("before", reference), ("after", outcome.merged or outcome.output))
    )
    console.print(
        f"next: [cyan]flexalign evaluate {escape(before)} {escape(after)} --baseline before "
        "--task questions.jsonl --limit 100 --samples 1 "
        f"-o {escape(shlex.quote(f'{outcome.output}-evaluated'))}[/cyan] (a first look; the "
        "whole without --limit and --samples)",
        soft_wrap=True,
    )
