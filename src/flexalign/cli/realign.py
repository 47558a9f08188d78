"""``flexalign realign``: train a student to be the pair at a λ of your choice."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from flexalign.cli.console import console, print_json
from flexalign.cli.options import (
    AlignedPrompt,
    AllowPickle,
    Assignments,
    ByID,
    DryTraining,
    Private,
    PushTo,
    Recipe,
    RecipeOutput,
    ReferencePrompt,
    ResultAsJson,
    SkipBadRows,
    parse_lambda_option,
    read_side_prompts,
)
from flexalign.cli.training import planned_push, train

if TYPE_CHECKING:
    from flexalign.lambdas import LambdaRange
    from flexalign.training.plan import TrainingPlan
    from flexalign.training.recipes import RealignRecipe
    from flexalign.training.run import Outcome


def realign(
    recipe: Recipe,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            help="λ instead of the recipe's: a number, several, a JSON schedule, or for one LoRA of "
            "every λ a range, 0:5.",
        ),
    ] = None,
    output: RecipeOutput = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    by_id: ByID = False,
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
    push: PushTo = None,
    private: Private = False,
    dry_run: DryTraining = False,
    as_json: ResultAsJson = False,
) -> None:
    """Train a student towards the fusion of a reference and an aligned model (TrRa).

    A recipe is a YAML file; only the first five keys are needed:

    \b
    RECIPE KEYS

    Look first: [cyan]flexalign realign recipe.yaml --dry-run[/cyan]

    Then: [cyan]flexalign realign recipe.yaml --lambda 2 --set training.max_steps=100[/cyan]

    One model under two prompts: [cyan]flexalign realign recipe.yaml --aligned-prompt "system=Be brief."[/cyan]

    Several λ from one cache: [cyan]flexalign realign recipe.yaml --lambda 0.5,1,2 --set teacher=cached[/cyan]

    One LoRA for every λ: [cyan]flexalign realign recipe.yaml --lambda 0:5 --set lora.r=32[/cyan]

    Ctrl-C saves a checkpoint at the end of the step; the same command goes on from there.
    """
    from flexalign.training.recipes import RealignRecipe

    # Errors in the recipe are raised before the training libraries load.
    recipes = RealignRecipe.load_each(
        recipe,
        overrides=assignments or (),
        **read_side_prompts(reference_prompt, aligned_prompt),
        lam=parse_lambda_option(lam),
        output=output,
        merge=merge or None,
        allow_pickle=allow_pickle or None,
        by_id=by_id or None,
    )
    target = planned_push(push, private=private, recipes=len(recipes))
    from flexalign.training import realignment

    result = train(
        realignment.realign,
        recipes,
        dry_run=dry_run,
        as_json=as_json,
        push=target,
        table=_rows,
        extrapolate=extrapolate,
        skip_bad_rows=skip_bad_rows,
    )
    if result is None:
        return
    if result.students:
        _say_report(result)
    if as_json and not console.quiet:
        print_json(result.to_json())
    for outcome in result.students or (result,):
        if outcome.lambda_range is None:
            _summarise(outcome, recipes[0].models[0], _task_of(recipes[0], outcome))
        else:
            _summarise_dial(outcome, recipes[0].models[0], outcome.lambda_range)


def _say_report(result: "Outcome") -> None:
    from flexalign.training.realignment import describe_costs

    report = escape(str(result.output / "report.md"))
    console.print(f"all in one report: [bold]{report}[/bold]")
    costs = result.report["cost"]
    if costs:
        console.print(f"{describe_costs(costs, len(result.students))}. {costs['how']}")


def _task_of(recipe: "RealignRecipe", outcome: "Outcome") -> str | None:
    """Return a task for a student: the watched questions, or that of a known reference."""
    from flexalign.models.names import known_name

    watched = recipe.watch
    has_answers = bool(outcome.curve) and "accuracy" in outcome.curve[-1]
    if watched is not None and has_answers and not watched.columns:
        return watched.prompts
    known = known_name(recipe.models[0])
    return known[0].name if known is not None and known[0].task is not None else None


def _summarise(outcome: "Outcome", reference: str, task: str | None) -> None:
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
    asked = "QUESTIONS" if task is None else shlex.quote(task)
    file = "" if task is not None else "; QUESTIONS: a file of yours with `problem` and `answer`"
    console.print(
        f"next: [cyan]flexalign evaluate {escape(before)} {escape(after)} --baseline before "
        f"--task {escape(asked)} --limit 100 --samples 1 "
        f"-o {escape(shlex.quote(f'{outcome.output}-evaluated'))}[/cyan] (a first look; the "
        f"whole without --limit and --samples{file})",
        soft_wrap=True,
    )


def _summarise_dial(outcome: "Outcome", reference: str, trained: "LambdaRange") -> None:
    console.print(f"the LoRA dial:       [bold]{escape(str(outcome.output))}[/bold]")
    last = outcome.curve[-1]["step"] if outcome.curve else None
    for row in outcome.curve:
        if row["step"] in (0, last):
            accuracy = f", accuracy {row['accuracy']:.3f}" if "accuracy" in row else ""
            console.print(f"at λ = {row['lambda']:<13g} {row['tokens']:.1f} tokens{accuracy}")

    console.print(f"its model card:      {escape(str(outcome.output / 'README.md'))}")
    base, folder = shlex.quote(reference), shlex.quote(str(outcome.output))
    lams = ",".join(f"{lam:g}" for lam in trained.marks)
    console.print(
        f"next: [cyan]flexalign generate {escape(base)} QUESTION --adapter {escape(folder)} "
        f"--lambda {lams}[/cyan]",
        soft_wrap=True,
    )


def _rows(plan: "TrainingPlan") -> dict[str, str]:
    """Return a plan as the rows of a table."""
    from flexalign.models.hub import describe_sizes
    from flexalign.models.pair import SIDES
    from flexalign.models.prompted import PromptedModel

    facts = plan.facts
    data, memory = facts["data"], facts["memory_gib"]
    rows = {
        "reference, aligned": ", ".join(PromptedModel.parse(facts[side]).text for side in SIDES),
        **_read_by_id(facts),
        "λ": _describe_lambda(facts["lambda"]),
        "rows": f"{data['rows']:,}, of which {data['kept']:,} keep response tokens and "
        f"{data['truncated']:,} are shortened by the cut-off",
        "tokens": f"{data['prompt_tokens']:,} prompt, {data['response_tokens']:,} response; "
        f"rows of {data['shortest']:,} to {data['longest']:,}{_cut_off(data)}",
        "steps": f"{facts['steps']:,} of {facts['effective_batch']} rows, {facts['epochs']} epochs",
        "trained": f"{facts['trained_parameters']:,} parameters",
        "memory": f"about {memory['total']:.3g} GiB: "
        + ", ".join(f"{name} {size:.3g}" for name, size in memory.items() if name != "total"),
        "output": f"{facts['output']} ({facts['output_state']})",
    }
    if "downloads" in facts:
        rows["would download"] = describe_sizes(facts["downloads"])
    if facts["rounds"] > 1:
        rows["λ"] += f", {facts['rounds']} rounds: effective {facts['effective_lambda']:g}"
    return rows


def _cut_off(data: Mapping[str, Any]) -> str:
    most = data["max_length"]
    return "" if most is None or most >= data["longest"] else f", cut to {most:,} (max_length)"


def _read_by_id(facts: Mapping[str, Any]) -> dict[str, str]:
    renamed = [
        f"{one['id']} {one['reference']}, {one['aligned']}" for one in facts.get("renamed", ())
    ]
    return {"read by id": "; ".join(renamed)} if renamed else {}


def _describe_lambda(lam: Any) -> str:
    if isinstance(lam, dict) and "low" in lam:
        return (
            f"every λ from {lam['low']:g} to {lam['high']:g}: one LoRA, whose strength is λ; each "
            "row of a step draws its own"
        )
    return f"{lam}"
