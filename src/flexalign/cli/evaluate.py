"""``flexalign evaluate``: what each setting of the dial buys, on your questions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from flexalign.cli._evaluate import describe_lost, print_summary, warn_of_cuts, warn_of_sampling
from flexalign.cli.console import console, note, print_json, resumable_bar, say_instruction
from flexalign.cli.options import (
    BatchSize,
    Data,
    Dtype,
    EngineName,
    Gate,
    Instruction,
    LambdaRange,
    Policies,
    TaskMaxNewTokens,
    TaskTemperature,
    TaskTopP,
    Workers,
    read_efforts,
    read_lambdas,
    read_range,
    read_secret,
    read_settings,
)
from flexalign.errors import ConfigError, ServingError

if TYPE_CHECKING:
    from flexalign.evaluation.sweep import Sweep
    from flexalign.evaluation.tasks import Task
    from flexalign.systems import System


def evaluate(
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SYSTEM...",
            help="model:PATH, dial:BASE,ADAPTER, pair:REF,ALIGNED, interpolate:REF,ALIGNED or "
            "url:http://…; name= in front names it.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the results, or of those to go on with."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Questions: math500, aime, amc, gsm8k, miniature, or a file with problem and "
            "answer; repeatable."
        ),
    ] = None,
    data: Data = None,
    instruction: Instruction = None,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            help="λ to measure, such as 0,0.5,1,2: 0 is the reference, 1 the aligned model or the "
            "adapter's.",
        ),
    ] = None,
    policy: Policies = None,
    effort: Annotated[
        str | None,
        typer.Option(help="Efforts to measure, such as 0,50,100, of one calibrated dial:."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Answers to each question; 8 by default.")
    ] = None,
    temperature: TaskTemperature = None,
    top_p: TaskTopP = None,
    max_new_tokens: TaskMaxNewTokens = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions of each task, drawn.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all sampling and of --limit's draw.")] = 0,
    baseline: Annotated[
        str | None,
        typer.Option(help="System that token cuts of systems without λ = 0 are held against."),
    ] = None,
    batch_size: BatchSize = 32,
    gate: Gate = None,
    lambda_range: LambdaRange = None,
    dtype: Dtype = "auto",
    engine: Annotated[
        EngineName, typer.Option(help="local runs here; vllm is for plain models.")
    ] = EngineName.LOCAL,
    model_name: Annotated[str | None, typer.Option(help="The model's name at a url:.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of a url:'s model; counts where the server does not.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds a url:'s key.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at a url: at one time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one response.")] = 1800.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries per request.")] = 5,
    workers: Workers = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show prompts as sent and the cost; sample nothing.")
    ] = False,
    regrade: Annotated[
        bool, typer.Option("--regrade", help="Grade the stored samples again; sample nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Measure systems at several settings of their dial, on questions with known answers.

    Every setting answers the same questions with the same seeds. A run that broke off goes on
    where it stopped when the same command is given again. DIR gets samples.jsonl, summary.json
    and the report.

    Example: [cyan]flexalign evaluate pair:miniature --task miniature --limit 100
    --lambda 0,0.5,1,2 -o out/sweep[/cyan]

    Example: [cyan]flexalign evaluate mine=dial:models/R1,out/adapter --task math500 --data DIR
    --lambda 0,0.25,0.5,1 --policy 'adaptive 0.5' -o out/dial[/cyan]

    Example: [cyan]flexalign evaluate url:http://localhost:8000/v1 --task questions.jsonl
    --lambda 0,1 -o out/server[/cyan]

    Example: [cyan]flexalign evaluate --regrade -o out/sweep[/cyan]
    """
    if regrade:
        if output is None or systems or task:
            raise ConfigError("--regrade takes --output DIR alone: it samples nothing.")
        _regrade(output, workers, as_json)
        return
    if not systems or not task:
        raise ConfigError("name at least one SYSTEM and one --task.")
    if output is None and not dry_run:
        raise ConfigError("name the folder of the results with --output DIR.")
    lams, limits = read_lambdas(lam), read_range(lambda_range)
    from flexalign.systems import SystemOptions, parse_systems

    asked = parse_systems(systems)
    settings = read_settings(lams, policy or [], read_efforts(effort, _only_adapter(effort, asked)))
    from flexalign.evaluation.sweep import Sweep
    from flexalign.evaluation.tasks import load_task

    drawn = {"data": data, "limit": limit, "seed": seed, "instruction": instruction}
    tasks = [load_task(name, **drawn) for name in task]  # type: ignore[arg-type]
    say_instruction(instruction, tasks)
    options = SystemOptions(
        temperature=_default(temperature, tasks, "temperature"),
        top_p=_default(top_p, tasks, "top_p"),
        max_new_tokens=_default(max_new_tokens, tasks, "max_new_tokens"),
        batch_size=batch_size,
        gate=gate,
        dtype=dtype,
        lambda_range=limits,
        model_name=model_name,
        tokenizer=tokenizer,
        concurrency=concurrency,
        timeout_seconds=timeout,
        attempts=attempts,
        api_key=read_secret(api_key_env),
        engine=engine.value,
    )
    count = _default(samples, tasks, "samples")
    sweep = Sweep(asked, tasks, settings, count, seed, baseline, options)
    unreadable = _warn(sweep, workers)
    if dry_run or output is None:
        _preview(sweep, unreadable, as_json)
        return
    summary = _run(sweep, output, workers)
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)


def _only_adapter(effort: str | None, systems: "list[System]") -> str | None:
    """The adapter whose calibration says what an effort is."""
    adapters = [system.parts[1] for system in systems if system.kind == "dial"]
    if effort is not None and len(adapters) > 1:
        raise ConfigError(
            "an effort is another setting for each adapter; measure one dial: at a time with "
            "--effort, and put the runs together with flexalign compare."
        )
    return adapters[0] if adapters else None


def _default(given: Any, tasks: "list[Task]", name: str) -> Any:
    """What was asked for, else what the tasks agree on."""
    if given is not None:
        return given
    values = {getattr(task.sampling, name) for task in tasks}
    if len(values) > 1:
        option = name.replace("_", "-")
        raise ConfigError(
            f"the tasks differ in their usual {option} ({', '.join(map(str, sorted(values)))}); "
            f"give one for all with --{option}."
        )
    return values.pop()


def _warn(sweep: "Sweep", workers: int) -> list[dict[str, str]]:
    """Say what is doubtful before anything is sampled; return answers that cannot be read."""
    from flexalign.evaluation.grading import Grader
    from flexalign.evaluation.tasks import sample_warning, unreadable_golds

    if sweep.baseline is None and len(sweep.systems) > 1:
        warn_of_cuts(sweep)
    warn_of_sampling(sweep)
    unreadable = []
    with Grader(workers=workers) as grader:
        for task in sweep.tasks:
            warning = sample_warning(task, sweep.samples)
            if warning is not None:
                note(warning)
            unreadable += [
                {"task": task.name, "question": question.id, "gold": question.gold}
                for question in unreadable_golds(task, grader)
            ]
    if unreadable:
        note(
            f"{len(unreadable)} known answers cannot be read, so that no "
            "response can match them; mend or remove them:"
        )
        for row in unreadable:
            text = f"  {row['task']}, question {row['question']}: {row['gold']}"
            console.print(text, markup=False, soft_wrap=True)
    return unreadable


def _preview(sweep: "Sweep", unreadable: list[dict[str, str]], as_json: bool) -> None:
    prompts = sweep.previews()
    most = sweep.total * sweep.options.max_new_tokens
    if as_json:
        print_json(
            {
                "samples": sweep.total,
                "tokens_at_most": most,
                "prompts": [
                    {"system": name, "task": task, "prompt": text} for name, task, text in prompts
                ],
                "unreadable_golds": unreadable,
                "configuration": sweep.configuration(),
            }
        )
        return
    for name, task, text in prompts:
        console.rule(escape(f"{name} · first prompt of {task}"))
        console.print(text, markup=False, soft_wrap=True)
    console.rule()
    for system in sweep.systems:
        ids = ", ".join(setting.label for setting in sweep.settings_of(system))
        console.print(f"{system.name}: {ids}", markup=False, soft_wrap=True)
    console.print(
        f"would make {sweep.total} samples, at most {most:,} tokens "
        f"({sweep.options.max_new_tokens} each)."
    )


def _run(sweep: "Sweep", output: Path, workers: int) -> dict[str, Any]:
    from flexalign.cli.console import quieten_libraries

    quieten_libraries()
    total = sweep.total
    with resumable_bar("samples", total) as advance:
        result = sweep.run(output, workers=workers, begun=advance, progress=advance)
    complete = total - len(result.lost)
    console.print(f"{escape(str(output))}: {complete} of {total} samples, {result.made} made now.")
    if result.lost or result.summary is None:
        raise ServingError(describe_lost(result.lost, total))
    _report(output)
    return result.summary


def _report(output: Path) -> None:
    from flexalign.evaluation.report import write_report

    console.print(f"The report: {escape(str(write_report([output], output)))}")


def _regrade(output: Path, workers: int, as_json: bool) -> None:
    from flexalign.evaluation.sweep import regrade

    summary, changed = regrade(output, workers=workers)
    console.print(f"{escape(str(output))}: {changed} grades have changed.")
    _report(output)
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)
