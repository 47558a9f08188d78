"""``flexalign tune``: the fewest tokens that keep the accuracy, with a promise."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flexalign.cli.console import (
    as_input_errors,
    console,
    note,
    print_json,
    progress_bar,
    result_console,
    resumable_bar,
    say_instruction,
    without_downloads,
)
from flexalign.cli.options import (
    AlignedPrompt,
    BatchSize,
    ByID,
    Columns,
    Data,
    Instruction,
    OneTask,
    PermittedRange,
    ReferencePrompt,
    ResultAsJson,
    TaskMaxNewTokens,
    TaskTemperature,
    TaskTopP,
    Workers,
    prompt_options,
    read_lambdas,
    read_prompt_pair,
    read_range,
    refuse_options,
)
from flexalign.errors import ConfigError
from flexalign.lambdas import Setting, parse_lambdas

if TYPE_CHECKING:
    from flexalign.analysis.preview import Preview
    from flexalign.calibration import Constraint, ProofPlan, Tuned
    from flexalign.calibration.tune import Tuning
    from flexalign.models.prompted import PromptPair
    from flexalign.systems import System

_LAMBDAS = "a dial's range in quarters, or 0.25,0.5,0.75,1,"
"""The library's default candidates, for the help text."""

_SHOWN = 13
"""The most rows of a preview's table."""

_OF_PREVIEW = (
    *("system", "preview", "lambdas", "top_k", "limit", "batch_size", "output", "as_json"),
    *("reference_prompt", "aligned_prompt", "by_id"),
)
"""Parameters that ``--preview`` reads."""

_OF_SAMPLING = (
    *("instruction", "limit", "temperature", "top_p", "max_new_tokens", "batch_size"),
    *("lambda_range", "reference_prompt", "aligned_prompt", "by_id", "workers"),
)
"""Parameters that have no effect on answers that exist already."""


def tune(
    context: typer.Context,
    system: Annotated[
        str | None,
        typer.Argument(help="What is tuned, such as dial:BASE,ADAPTER; none with --from."),
    ] = None,
    task: OneTask = None,
    data: Data = None,
    columns: Columns = None,
    instruction: Instruction = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions, drawn.")] = None,
    margin: Annotated[
        float, typer.Option(help="Loss of accuracy that is accepted; 0.02 is two points.")
    ] = 0.02,
    max_tokens_mean: Annotated[
        float | None,
        typer.Option(help="Instead: most accuracy within so many tokens a mean answer."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="That a promise made is kept.")] = 0.95,
    lambdas: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            help=f"Candidates: 0 is the reference, which they are held against, 1 the aligned "
            f"model or the adapter's; {_LAMBDAS} if none is given.",
        ),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="More candidates: 'adaptive 0.5', JSON, or 'ladder 0.9,0.6' of interpolate:; "
            "repeatable.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", help="Answers to each question; 8 by default."),
    ] = None,
    temperature: TaskTemperature = None,
    top_p: TaskTopP = None,
    max_new_tokens: TaskMaxNewTokens = None,
    batch_size: BatchSize = 32,
    looks: Annotated[
        str,
        typer.Option(
            help="How the error is shared among looks: obrien-fleming, pocock, or betting, which "
            "holds for any distribution of the questions and needs more of them."
        ),
    ] = "obrien-fleming",
    seed: Annotated[
        int, typer.Option(help="Of all sampling, of --limit's draw and of the order.")
    ] = 0,
    stored: Annotated[
        Path | None,
        typer.Option("--from", help="Take answers from the --output of an evaluate run."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for tuned.md and samples.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Only say what could be proved, and what more costs.")
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            help="Only read traces, with both models, and show for 50 λ how far the teacher is "
            "from the reference; nothing is sampled."
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option(help="Of --preview: tokens that count as a model's own.")
    ] = 5,
    power: Annotated[float, typer.Option(help="Of the plan.")] = 0.8,
    accuracy: Annotated[
        float | None, typer.Option(help="Expected accuracy, for the plan; else one by task.")
    ] = None,
    lambda_range: PermittedRange = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    by_id: ByID = False,
    workers: Workers = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all, show a prompt and the plan; sample nothing."),
    ] = False,
    as_json: ResultAsJson = False,
) -> None:
    """Choose the setting that saves most tokens and keeps the accuracy, with a promise.

    Candidates race on some of the questions; what wins is proved on the others against λ = 0. A
    promise that is not kept is made with probability 1 − confidence at most. That none can be
    promised is an answer too. A run that broke off goes on when the command is given again.

    First ask what your questions can prove, before anything is sampled:
    [cyan]flexalign tune --plan --task aime --samples 8 --data DIR[/cyan]

    Then choose:
    [cyan]flexalign tune dial:BASE,ADAPTER --task math500 --margin 0.02 -o out/tuned[/cyan]

    λ and adaptive thresholds together, on the built-in miniature:
    [cyan]flexalign tune dial:miniature --task miniature --margin 0.1 --lambda 0.5,1
    --policy 'adaptive 0.9' -o out/tuned[/cyan]

    Before anything is sampled, what λ would do to the tokens of traces:
    [cyan]flexalign tune pair:REF,ALIGNED --preview traces.jsonl -o out/preview[/cyan]

    From a sweep that is there, at no cost:
    [cyan]flexalign tune --from out/sweep --margin 0.02 -o out/tuned[/cyan]
    """
    if preview is not None:
        where = "with --preview, which reads traces and samples nothing"
        refuse_options(context, where, besides=_OF_PREVIEW)
    else:
        refuse_options(context, "without --preview, as it limits no sampling", of=("top_k",))
    if stored is not None:
        refuse_options(context, "with --from, which samples nothing", of=_OF_SAMPLING)
    if max_tokens_mean is not None:
        refuse_options(context, "with --max-tokens-mean", of=("margin",))

    two_prompts = read_prompt_pair(reference_prompt, aligned_prompt)
    if preview is not None:
        _preview(
            system, two_prompts, preview, lambdas, top_k, limit, batch_size, output, as_json, by_id
        )
        return

    given = [*read_lambdas(lambdas), *(policies or [])]
    limits = read_range(lambda_range)
    from flexalign.calibration import Constraint, NonInferiority, TokenBudget, TuneOptions
    from flexalign.calibration.results import StoredSamples
    from flexalign.calibration.tune import Tuning, plan_tuning
    from flexalign.data.columns import parse_columns
    from flexalign.evaluation.samples import ResultsFolder
    from flexalign.evaluation.tasks import load_task
    from flexalign.systems import parse_system

    kept: Constraint = (
        NonInferiority(margin) if max_tokens_mean is None else TokenBudget(max_tokens_mean)
    )
    if output is None and not (plan_only or dry_run):
        raise ConfigError("--output is missing; name a folder for tuned.md and the samples.")

    asked = None
    if task is not None:
        asked = load_task(
            task,
            data=data,
            limit=limit,
            seed=seed,
            instruction=instruction,
            columns=parse_columns(columns, "--columns"),
        )

    if stored is not None:  # answers that exist already: nothing is sampled
        if system is not None:
            raise ConfigError("SYSTEM is not asked with --from; leave one of the two out.")
        found = StoredSamples(ResultsFolder.read(stored), task=asked.name if asked else None)
        options = TuneOptions(confidence, samples or found.samples, looks=looks, seed=seed)  # type: ignore[arg-type]
        planned = plan_tuning(found, options, accuracy=accuracy, power=power)
        if plan_only or dry_run or output is None:
            _show_plan(planned, kept, as_json)
            return
        _warn_of_margin(planned, kept)
        tuning = Tuning.of_stored(found, kept, given, options)
        _show(tuning, tuning.run(output), output, as_json)
        return

    if asked is None:
        raise ConfigError("--task is missing; name the questions, such as --task math500.")
    own = samples or asked.sampling.samples
    options = TuneOptions(confidence, own, looks=looks, seed=seed)  # type: ignore[arg-type]
    planned = plan_tuning(asked, options, accuracy=accuracy, power=power)
    if plan_only:
        _show_plan(planned, kept, as_json)
        return
    if system is None:
        raise ConfigError("SYSTEM is missing; say what is tuned, such as dial:BASE,ADAPTER.")

    say_instruction(instruction, [asked])
    parsed = parse_system(system)
    with without_downloads(dry_run=dry_run):
        with as_input_errors():
            tuning = Tuning.of_system(
                parsed,
                asked,
                kept,
                given,
                options,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                lambda_range=limits,
                prompts=two_prompts,
                by_id=by_id,
            )
        _warn_of_margin(planned, kept)
        if dry_run or output is None:
            _show_prompt(tuning)
            _show_plan(planned, kept, as_json)
            return
    _show(tuning, _draw(tuning, output, workers), output, as_json, parsed, two_prompts, by_id=by_id)


def _show_prompt(tuning: "Tuning") -> None:
    sweep = tuning.sweep
    (_, _, prompt) = sweep.previews()[0]
    console.rule("the first prompt")
    console.print(prompt, markup=False, soft_wrap=True)
    console.rule()
    console.print(f"would draw at most {sweep.total} samples.")


def _draw(tuning: "Tuning", output: Path, workers: int) -> "Tuned":
    from flexalign.cli.console import quieten_libraries

    tuning.require_possible()
    quieten_libraries()
    with resumable_bar("samples, at most", tuning.sweep.total) as advance:
        return tuning.run(output, workers=workers, progress=advance)


def _show(
    tuning: "Tuning",
    tuned: "Tuned",
    output: Path,
    as_json: bool,
    system: "System | None" = None,
    prompts: "PromptPair | None" = None,
    *,
    by_id: bool = False,
) -> None:
    """Print the result and the next step."""
    from flexalign.lambdas import LAMBDA_LEGEND

    if as_json:
        print_json({"system": tuning.system, "task": tuning.task, **tuned.to_json()})
        return
    result_console.print(tuned.chosen or "none", markup=False)
    console.print(f"{tuned.chosen or 'none'}: {tuned.reason}.", markup=False)
    if tuned.chosen is not None:
        proof = tuned.at_proof[tuned.chosen]
        console.print(
            f"held-out: accuracy {proof.accuracy.mean:.3f} (λ = 0: "
            f"{proof.reference_accuracy.mean:.3f}), {proof.token_cut:.1%} fewer tokens."
        )
    console.print(
        f"{tuned.samples} of {tuned.exhaustive} samples were needed; see "
        f"{escape(str(output / 'tuned.md'))}."
    )
    console.print(LAMBDA_LEGEND, style="dim")

    chosen = next((setting for setting in tuning.settings if setting.id == tuned.chosen), None)
    for line in (how_to_choose(tuned), cost_of_iterating(tuned, system, chosen)):
        console.print(line, markup=False, soft_wrap=True)
    following = next_step(system, chosen, prompts, by_id=by_id)
    if following is not None:
        console.print(f"next: {following}", markup=False, soft_wrap=True)


def how_to_choose(tuned: "Tuned") -> str:
    """Answer, of this tuning, how λ is chosen: by what is proved."""
    rule = "How to choose λ: take what is proved, not what looks best."
    count = len(tuned.candidates)
    among = "The only candidate" if count == 1 else f"Of {count} candidates"
    if tuned.chosen is None:
        none = "is not proved" if count == 1 else "none is proved"
        return f"{rule} {among} {none} here ({tuned.constraint.text}); λ = 0 is what is left."
    questions = tuned.at_proof[tuned.chosen].questions
    if count == 1:
        return f"{rule} {among} is, on {questions} questions: {tuned.constraint.text}."
    return (
        f"{rule} {among} {tuned.chosen} is, on {questions} questions that had no part in the choice: "
        f"{tuned.constraint.text}."
    )


def cost_of_iterating(tuned: "Tuned", system: "System | None", chosen: "Setting | None") -> str:
    """Answer, of this tuning, what a second round costs in accuracy.

    Two rounds of λ aim at λ², as the second one's aligned model is the first one's student. If λ²
    was a candidate, its figures are given, as they were when λ was chosen.

    Args:
        tuned: The result.
        system: The system that was tuned; None if its answers came from a folder.
        chosen: The chosen setting; None if none was proved.
    """
    rule = "What iterating costs in accuracy:"
    if system is not None and system.kind == "dial":
        return f"{rule} a dial is not iterated; turning it further is a larger λ, a candidate here."
    lam = None if chosen is None else chosen.lam
    if lam is None or lam in (0, 1):
        return (
            f"{rule} n rounds of λ aim at λⁿ and each adds an error of its training, so that they "
            "cost what λⁿ costs, and a little more; give λ² among the candidates to see it."
        )

    target = Setting.of(round(lam**2, 6))
    aim = f"{rule} two rounds of λ = {lam:g} aim at λ = {target.lam:g}"
    seen = tuned.at_choice.get(target.id)
    if seen is None:
        return f"{aim}, which was no candidate; see what that costs with --lambda {lam:g},{target.lam:g}."
    low, change, high = (100 * value for value in seen.difference)
    return (
        f"{aim}, whose accuracy is {change:+.1f} points [{low:+.1f}, {high:+.1f}] from λ = 0's with "
        f"{seen.token_cut:.1%} fewer tokens ({seen.questions} questions, not a promise); each round "
        "adds an error of its training."
    )


def next_step(
    system: "System | None",
    chosen: "Setting | None",
    prompts: "PromptPair | None" = None,
    *,
    by_id: bool = False,
) -> str | None:
    """Return the next command for a result; None if there is none to propose.

    Args:
        system: The system that was tuned; None if its answers came from a folder.
        chosen: The chosen setting; None if none was proved.
        prompts: The two prompts of the system, if it has two.
        by_id: Whether its two models are read by id.
    """
    if chosen is None:
        return "more questions, more --samples or a wider --margin; --plan says what would do"
    if system is None or system.kind not in ("dial", "pair", "prompts"):
        return None
    if system.kind == "pair" and chosen.lam is not None:
        read = " --by-id" if by_id else ""
        return f"flexalign realign recipe.yaml --lambda {chosen.lam:g}{read}, for one model that does it"

    second = {"dial": "--adapter", "pair": "--aligned"}.get(system.kind)
    dial = [second, system.parts[1]] if second is not None else prompt_options(prompts)
    dial += ["--by-id"] if by_id else []
    turned = ["--policy", json.dumps(chosen.policy)]
    if chosen.lam is not None:
        turned = ["--lambda", f"{chosen.lam:g}"]
    return shlex.join(["flexalign", "generate", system.parts[0], *dial, *turned])


def _warn_of_margin(planned: "ProofPlan", kept: "Constraint") -> None:
    margin, is_proved = planned.verdict(kept)
    if margin is not None and not is_proved:
        note(
            f"a margin of {100 * margin:g} points will often not be proved by "
            "these questions, even of an equal setting (--plan says what would be)."
        )


def _show_plan(planned: "ProofPlan", kept: "Constraint", as_json: bool) -> None:
    margin, is_proved = planned.verdict(kept)
    if as_json:
        print_json({**planned.to_json(), "asked_margin": margin, "is_proved": is_proved})
        return

    def show(text: str) -> None:
        result_console.print(text, soft_wrap=True)

    show(
        f"{planned.questions} questions × {planned.samples} samples prove a margin of "
        f"{100 * planned.margin:.1f} points for one setting named beforehand "
        f"(confidence {100 * planned.confidence:g} %, power {100 * planned.power:g} %)."
    )
    if planned.tune_margin is not None:
        show(
            f"tune, which chooses on a part, proves on the rest and reckons with rare whole losses: "
            f"{100 * planned.tune_margin:.1f} points."
        )
    if margin is not None:
        able = "will" if is_proved else "will not"
        show(
            f"Your margin, {100 * margin:g} points: tune {able} mostly prove it of a setting that is as "
            "good as the reference."
        )
    show(
        f"Assumed variance of a question's paired difference: {planned.variance.between:.4f} "
        f"between questions, {planned.variance.within:.4f} within, divided by the samples."
    )
    for cost in planned.costs:
        questions = f"{cost.questions} questions" if cost.questions else "more than 10⁷ questions"
        samples = (
            f"{cost.samples} samples of each question"
            if cost.samples
            else "no number of samples of these questions"
        )
        show(f"  {100 * cost.margin:.1f} points: {questions}, or {samples}")


def _preview(
    system: str | None,
    prompts: "PromptPair | None",
    traces: Path,
    lambdas: str | None,
    top_k: int,
    limit: int | None,
    batch_size: int,
    output: Path | None,
    as_json: bool,
    by_id: bool,
) -> None:
    """Read traces with both models of a system; print and write the effect of λ on their tokens."""
    if system is None:
        raise ConfigError(
            "SYSTEM is missing; say what is previewed: pair:REF,ALIGNED, prompts: or dial:."
        )
    asked = None if lambdas is None else [one.lam for one in parse_lambdas(lambdas)]
    from flexalign.analysis.preview import PREVIEW_LAMBDAS, open_preview, preview, write_preview
    from flexalign.cli.console import quieten_libraries, warnings_as_notes
    from flexalign.systems import parse_system

    quieten_libraries()
    with as_input_errors(), warnings_as_notes():
        model, rows = open_preview(parse_system(system), traces, prompts, limit=limit, by_id=by_id)
    with progress_bar("reading with both models", len(rows)) as show:
        found = preview(
            model,
            rows,
            lams=PREVIEW_LAMBDAS if asked is None else asked,
            top_k=top_k,
            batch_size=batch_size,
            progress=lambda done, _: show(done),
        )

    if output is not None:
        write_preview(found, output)
    if as_json:
        print_json(found.to_json())
    else:
        _print_preview(found)


def _print_preview(found: "Preview") -> None:
    from flexalign.lambdas import LAMBDA_LEGEND

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("λ", "divergence", f"outside top {found.top_k}", "probability outside"):
        table.add_column(name, justify="right")
    step = max(1, -(-len(found.rows) // _SHOWN))
    for row in found.rows[step - 1 :: step]:
        table.add_row(
            f"{row.lam:g}",
            f"{row.divergence:.4f}",
            f"{100 * row.outside:.3f} %",
            f"{100 * row.mass_outside:.3f} %",
        )
    result_console.print(table)
    result_console.print(
        f"{LAMBDA_LEGEND}; {found.tokens:,} tokens; divergence of the teacher from the reference in nats per token; "
        "outside: the teacher's top choice is among neither model's likeliest.",
        style="dim",
        markup=False,
    )
    console.print(
        f"The teacher's choice leaves both models' top {found.top_k} (one token in a thousand) "
        + ("at no λ here." if found.leaves_at is None else f"from λ = {found.leaves_at:g} on.")
    )
