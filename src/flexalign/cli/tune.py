"""``flexalign tune``: the fewest tokens that keep the accuracy, with a promise."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flexalign.cli._preview import show_preview
from flexalign.cli._tune import (
    next_step,
    plan_of,
    settings_of,
    show_plan,
    sweep_of,
    variance_of,
    warn_of_margin,
)
from flexalign.cli.console import (
    console,
    print_json,
    result_console,
    resumable_bar,
    say_instruction,
)
from flexalign.cli.options import (
    BatchSize,
    Data,
    Instruction,
    LambdaRange,
    OneTask,
    ResultAsJson,
    TaskMaxNewTokens,
    TaskTemperature,
    TaskTopP,
    Workers,
    read_lambdas,
    read_range,
)
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.calibration import Goal, Tuned, TuneOptions
    from flexalign.calibration.results import StoredAnswers
    from flexalign.evaluation.sweep import Sweep
    from flexalign.lambdas import Setting
    from flexalign.systems import System

_LAMBDAS = "0.25,0.5,0.75,1"


def tune(
    system: Annotated[
        str | None,
        typer.Argument(help="What is tuned, such as dial:BASE,ADAPTER; none with --from."),
    ] = None,
    task: OneTask = None,
    data: Data = None,
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
        typer.Option("--policy", help="More candidates: 'adaptive 0.5' or JSON; repeatable."),
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
    lambda_range: LambdaRange = None,
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
        show_preview(system, preview, lambdas, top_k, limit, batch_size, output, as_json)
        return
    lams, limits = read_lambdas(lambdas), read_range(lambda_range)
    from flexalign.calibration import NonInferiority, TokenBudget, TuneOptions
    from flexalign.calibration.results import StoredAnswers
    from flexalign.evaluation.samples import ResultsFolder
    from flexalign.evaluation.tasks import load_task
    from flexalign.lambdas import Setting
    from flexalign.systems import parse_system

    goal: Goal = NonInferiority(margin) if max_tokens_mean is None else TokenBudget(max_tokens_mean)
    if output is None and not (plan_only or dry_run):
        raise ConfigError("--output is missing; name a folder for tuned.md and the samples.")
    if stored is not None:
        if system is not None:
            raise ConfigError("SYSTEM is not asked with --from; leave one of the two out.")
        name = None if task is None else load_task(task, data=data, limit=limit, seed=seed).name
        answers = StoredAnswers(ResultsFolder.read(stored), task=name)
        options = TuneOptions(confidence, samples or answers.samples, looks=looks, seed=seed)  # type: ignore[arg-type]
        variance = variance_of(answers, answers.task, accuracy)
        planned = plan_of(len(answers.questions), options, power, variance)
        if plan_only or dry_run or output is None:
            show_plan(planned, goal, as_json)
            return
        warn_of_margin(planned, goal)
        settings = settings_of(lams, policies or [])
        if len(settings) == 1:
            settings += [Setting(name) for name in answers.settings if name != settings[0].id]
        tuned = _run(settings, answers, answers.questions, goal, options)
        _finish(tuned, output, as_json, answers, settings)
        return
    if task is None:
        raise ConfigError("--task is missing; name the questions, such as --task math500.")
    questions = load_task(task, data=data, limit=limit, seed=seed, instruction=instruction)
    options = TuneOptions(
        confidence,
        samples or questions.sampling.samples,
        looks=looks,  # type: ignore[arg-type]
        seed=seed,
    )
    planned = plan_of(
        len(questions.questions), options, power, variance_of(None, questions.name, accuracy)
    )
    if plan_only:
        show_plan(planned, goal, as_json)
        return
    if system is None:
        raise ConfigError("SYSTEM is missing; say what is tuned, such as dial:BASE,ADAPTER.")
    say_instruction(instruction, [questions])
    settings = settings_of(lams or ([] if policies else read_lambdas(_LAMBDAS)), policies or [])
    if len(settings) == 1:
        raise ConfigError(
            "there is no candidate besides λ = 0; name one with --lambda or --policy."
        )
    sweep = sweep_of(
        parse_system(system),
        questions,
        settings,
        options,
        {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "lambda_range": limits,
        },
    )
    warn_of_margin(planned, goal)
    if dry_run or output is None:
        (_, _, prompt) = sweep.previews()[0]
        console.rule("the first prompt")
        console.print(prompt, markup=False, soft_wrap=True)
        console.rule()
        console.print(f"would draw at most {sweep.total} samples.")
        show_plan(planned, goal, as_json)
        return
    _draw(sweep, settings, goal, options, output, workers, as_json)


def _draw(
    sweep: "Sweep",
    settings: "list[Setting]",
    goal: "Goal",
    options: "TuneOptions",
    output: Path,
    workers: int,
    as_json: bool,
) -> None:
    from flexalign.calibration.results import DrawnAnswers
    from flexalign.cli.console import quieten_libraries

    quieten_libraries()
    (task,) = sweep.tasks
    with (
        resumable_bar("samples, at most", sweep.total) as advance,
        DrawnAnswers(sweep, output, workers=workers, progress=advance) as answers,
    ):
        ids = [question.id for question in task.questions]
        tuned = _run(settings, answers, ids, goal, options)
    _finish(tuned, output, as_json, answers, settings, sweep.systems[0])


def _run(
    settings: "list[Setting]",
    answers: "StoredAnswers",
    questions: list[str],
    goal: "Goal",
    options: "TuneOptions",
) -> "Tuned":
    from flexalign.calibration import tune

    reference, *candidates = [setting.id for setting in settings]
    return tune(candidates, answers.ask, questions, goal, reference=reference, options=options)


def _finish(
    tuned: "Tuned",
    output: Path,
    as_json: bool,
    answers: "StoredAnswers",
    settings: "list[Setting]",
    system: "System | None" = None,
) -> None:
    from flexalign.calibration.card import write_card
    from flexalign.lambdas import LAMBDA_LEGEND

    write_card(tuned, output, {"system": answers.system, "task": answers.task})
    if as_json:
        print_json({"system": answers.system, "task": answers.task, **tuned.to_json()})
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
    chosen = next((setting for setting in settings if setting.id == tuned.chosen), None)
    following = next_step(system, chosen)
    if following is not None:
        console.print(f"next: {following}", markup=False, soft_wrap=True)
