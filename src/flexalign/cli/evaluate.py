"""``flexalign evaluate``: what each setting of the dial buys, on your questions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flexalign.cli.console import (
    as_input_errors,
    console,
    note,
    print_json,
    result_console,
    resumable_bar,
    say_instruction,
    warnings_as_notes,
    without_downloads,
)
from flexalign.cli.options import (
    UNCHANGED_LOGITS,
    AlignedPrompt,
    Attempts,
    BatchSize,
    ByID,
    Calibrated,
    Columns,
    Concurrency,
    Data,
    Dtype,
    EngineName,
    Gate,
    Instruction,
    PermittedRange,
    ReferencePrompt,
    ServerKey,
    ServerModel,
    TaskMaxNewTokens,
    TaskTemperature,
    TaskTopP,
    Template,
    Timeout,
    Workers,
    read_efforts,
    read_lambdas,
    read_prompt_pair,
    read_range,
    read_secret,
    read_settings,
    refuse_options,
    say_efforts,
    with_logits_options,
)
from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.evaluation.summary import Summary, SummaryMean
    from flexalign.evaluation.sweep import Sweep
    from flexalign.models.prompted import PromptPair
    from flexalign.statistics import Interval
    from flexalign.systems import System

_LEGEND = (
    "accuracy, cut (of tokens, against λ = 0 or the baseline) and lost (truncated, unparsed or no "
    "answer) in %; to chord: points of accuracy above a coin between λ = 0 and λ = 1 at equal "
    "tokens; in brackets 95 % intervals, clustered by question."
)


@with_logits_options
def evaluate(
    context: typer.Context,
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SYSTEM...",
            help="model:PATH, dial:BASE,ADAPTER, lora:BASE,ADAPTER (any PEFT LoRA, scaled by λ), "
            "pair:REF,ALIGNED, prompts:MODEL, "
            "interpolate:REF,ALIGNED or url:http://…; name= in front names it.",
        ),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="NAME:KEY=VALUE",
            help="Of one system alone, by its name: system=TEXT (a system message), thinking_budget, "
            "end_of_thinking_bias, or an argument of its chat template, such as "
            "enable_thinking=false; repeatable.",
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
    columns: Columns = None,
    instruction: Instruction = None,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            help="λ to measure, such as 0,0.5,1,2: 0 is the reference, 1 the aligned model or the "
            "adapter's.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="'adaptive 0.5', 'exit 0.95', 'route 0.3', auto, or JSON of a policy or a schedule; "
            "of interpolate: 'ladder 0.9,0.6'; repeatable.",
        ),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="Efforts to measure, such as 0,50,100, of one calibrated dial: or prompts:."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Answers to each question; 8 by default.")
    ] = None,
    temperature: TaskTemperature = None,
    top_p: TaskTopP = None,
    logits: LogitsSettings = UNCHANGED_LOGITS,
    max_new_tokens: TaskMaxNewTokens = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions of each task, drawn.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all sampling and of --limit's draw.")] = 0,
    baseline: Annotated[
        str | None,
        typer.Option(help="System that token cuts of systems without λ = 0 are held against."),
    ] = None,
    any_training: Annotated[
        bool,
        typer.Option(
            "--any-training",
            help="Compare students of one pair that were trained differently; the report says how.",
        ),
    ] = False,
    batch_size: BatchSize = 32,
    gate: Gate = None,
    lambda_range: PermittedRange = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    calibration: Calibrated = None,
    by_id: ByID = False,
    template: Template = None,
    dtype: Dtype = "auto",
    engine: Annotated[
        EngineName, typer.Option(help="local runs here; vllm is for plain models.")
    ] = EngineName.LOCAL,
    model_name: ServerModel = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of a url:'s model; counts where the server does not.")
    ] = None,
    api_key_env: ServerKey = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 1800.0,
    attempts: Attempts = 5,
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

    Example: [cyan]flexalign evaluate prompts:models/hybrid --aligned-prompt enable_thinking=false
    --task math500 --data DIR --lambda 0,0.5,1,1.5 -o out/prompts[/cyan]

    Example: [cyan]flexalign evaluate plain=model:models/R1 brief=model:models/R1
    cut=model:models/R1 --for brief:system='Think in few words.' --for cut:thinking_budget=2000
    --task math500 --data DIR --baseline plain -o out/rivals[/cyan]

    Example: [cyan]flexalign evaluate --regrade -o out/sweep[/cyan]
    """
    if regrade:
        if output is None or systems or task:
            raise ConfigError("--regrade takes --output DIR alone: it samples nothing.")
        refuse_options(
            context,
            "with --regrade, which grades what --output holds",
            besides=("regrade", "output", "workers", "as_json"),
        )
        _show(_regrade(output, workers), as_json)
        return
    if not systems or not task:
        raise ConfigError("name at least one SYSTEM and one --task.")
    if output is None and not dry_run:
        raise ConfigError("name the folder of the results with --output DIR.")

    lams, limits = read_lambdas(lam), read_range(lambda_range)

    from flexalign.data.columns import parse_columns
    from flexalign.data.prompting import parse_template
    from flexalign.systems import parse_systems

    asked = parse_systems(systems, own or [])
    two_prompts = read_prompt_pair(reference_prompt, aligned_prompt)
    adapter, own_prompts = _only_dial(effort, asked, two_prompts)
    efforts = read_efforts(effort, adapter, own_prompts, calibration)
    settings = read_settings(lams, policy or [], efforts)

    from flexalign.evaluation.sweep import plan_sweep
    from flexalign.evaluation.tasks import load_task

    named = parse_columns(columns, "--columns")
    drawn = {"data": data, "limit": limit, "seed": seed, "instruction": instruction}
    tasks = [load_task(name, columns=named, **drawn) for name in task]  # type: ignore[arg-type]
    say_instruction(instruction, tasks)

    with warnings_as_notes(), without_downloads(dry_run=dry_run):
        with as_input_errors():
            sweep = plan_sweep(
                asked,
                tasks,
                settings=settings,
                samples=samples,
                seed=seed,
                baseline=baseline,
                any_training=any_training,
                temperature=temperature,
                top_p=top_p,
                logits=logits,
                max_new_tokens=max_new_tokens,
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
                on_retry=note,
                engine=engine.value,
                template=parse_template(template or []),
                prompts=two_prompts,
                calibration=calibration,
                by_id=by_id,
            )
        say_efforts(efforts, _calibration_of(sweep))
        unreadable = _warn(sweep, workers)
        if dry_run or output is None:
            _preview(sweep, unreadable, as_json)
            return
        _show(_run(sweep, output, workers), as_json)


def _only_dial(
    effort: str | None, systems: "list[System]", prompts: "PromptPair | None"
) -> "tuple[str | None, PromptPair | None]":
    """Return the adapter, or the two prompts, whose calibration defines the efforts, if any does."""
    dials = [system for system in systems if system.kind in ("dial", "prompts")]
    if effort is not None and len(dials) > 1:
        raise ConfigError(
            "an effort is another setting for each adapter, and for each model under two prompts; "
            "measure one dial: or prompts: at a time with --effort, and put the runs together with "
            "flexalign compare."
        )
    if not dials:
        return None, None
    dial = dials[0]
    return (dial.parts[1], None) if dial.kind == "dial" else (None, prompts)


def _calibration_of(sweep: "Sweep") -> dict[str, Any] | None:
    """Return the calibration of the sweep's only dial; None if it has none."""
    from flexalign.systems import LocalBackend

    found = [one.calibration for one in sweep.backends.values() if isinstance(one, LocalBackend)]
    return next((one for one in found if one is not None), None)


def _warn(sweep: "Sweep", workers: int) -> list[dict[str, str]]:
    """Print warnings before anything is sampled.

    Returns:
        The known answers that the grader cannot read.
    """
    from flexalign.calibration.effort import sweep_notes

    for caution in [*sweep.cautions(), *sweep_notes(sweep)]:
        note(caution)

    unreadable = sweep.unreadable_golds(workers=workers)
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


def _run(sweep: "Sweep", output: Path, workers: int) -> "Summary":
    from flexalign.cli.console import quieten_libraries

    quieten_libraries()
    with resumable_bar("samples", sweep.total) as advance:
        result = sweep.run(output, workers=workers, begun=advance, progress=advance)

    complete = f"{result.total - len(result.lost)} of {result.total} samples"
    console.print(f"{escape(str(output))}: {complete}, {result.made} made now.")
    summary = result.require_complete()
    for text in (summary.environment or {}).get("notes", ()):
        if text not in sweep.notes:  # those were printed before anything was sampled
            note(text)
    _report(output)
    return summary


def _regrade(output: Path, workers: int) -> "Summary":
    from flexalign.evaluation.sweep import regrade

    summary, changed = regrade(output, workers=workers)
    console.print(f"{escape(str(output))}: {changed} grades have changed.")
    _report(output)
    return summary


def _report(output: Path) -> None:
    from flexalign.evaluation.report import write_report

    console.print(f"The report: {escape(str(write_report([output], output)))}")


def _show(summary: "Summary", as_json: bool) -> None:
    if as_json:
        print_json(summary.to_json())
    else:
        print_summary(summary)


def print_summary(summary: "Summary") -> None:
    """Print the rows of a summary, and means over tasks if there are several tasks."""
    from flexalign.lambdas import LAMBDA_LEGEND

    rows = summary.rows
    heads = [name for name in ("system", "task") if len({getattr(r, name) for r in rows}) > 1]
    constant = [getattr(rows[0], name) for name in ("system", "task") if name not in heads]
    if constant:
        result_console.print(" on ".join(constant), markup=False, style="bold")

    table = _table([*heads, "setting"], ["asked", "accuracy", "tokens", "cut", "to chord", "lost"])
    for row in rows:
        lost = row.truncated + row.unparsed + row.no_answer
        table.add_row(
            *(escape(getattr(row, name)) for name in heads),
            escape(row.label),
            f"{row.n_questions}×{row.n_samples / row.n_questions:g}",
            _figure(row.accuracy, 100),
            _figure(row.tokens),
            _figure(row.token_cut, 100),
            _figure(row.chord_distance, 100),
            f"{100 * lost:.1f}",
        )
    result_console.print(table)
    if "task" in heads:
        _print_means(summary.means)
    result_console.print(f"{LAMBDA_LEGEND}; {_LEGEND}", style="dim", markup=False)


def _print_means(means: "Sequence[SummaryMean]") -> None:
    table = _table(["system", "setting"], ["accuracy, mean", "cut, mean", "cut, pooled"])
    for mean in means:
        shares = (mean.accuracy, mean.token_cut_mean, mean.token_cut_pooled)
        table.add_row(
            escape(mean.system),
            escape(mean.label),
            *("—" if share is None else f"{100 * share:.1f}" for share in shares),
        )
    result_console.print(table)


def _table(words: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in words:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _figure(value: "Interval | None", scale: float = 1) -> str:
    if value is None:
        return "—"
    low, mean, high = (scale * one for one in value)
    known = math.isfinite(low) and math.isfinite(high)
    return f"{mean:.1f} \\[{low:.0f}, {high:.0f}]" if known else f"{mean:.1f}"
