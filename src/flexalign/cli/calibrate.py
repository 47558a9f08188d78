"""``flexalign calibrate``: give a dial a scale in tokens."""

import shlex
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
    without_downloads,
)
from flexalign.cli.options import (
    AlignedPrompt,
    BatchSize,
    Columns,
    Data,
    Dtype,
    FrequencyPenalty,
    Instruction,
    MinP,
    PresencePenalty,
    Private,
    PushTo,
    ReferencePrompt,
    RepetitionPenalty,
    TaskMaxNewTokens,
    TaskTemperature,
    TaskTopP,
    TopK,
    Workers,
    prompt_options,
    read_prompt_pair,
    read_range,
)
from flexalign.cli.training import planned_push
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.calibration import Calibration
    from flexalign.calibration.calibrate import CalibrationPlan
    from flexalign.calibration.effort import EffortLevel

_COARSE = 0.1
"""Relative difference from the line of tokens above which a note is printed."""


def _no_system(base: str) -> str:
    """Refuse a system in place of the model, before a missing --task is."""
    if base.startswith("prompts:"):
        model = base.removeprefix("prompts:")
        raise ConfigError(
            f"{base}: name the model alone, as in flexalign calibrate {model} --aligned-prompt …"
            " --save-to FOLDER."
        )
    return base


def calibrate(
    base: Annotated[
        str,
        typer.Argument(
            help="The adapter's base, or the model of two prompts: a folder, hub id or known name.",
            callback=_no_system,
            is_eager=True,
        ),
    ],
    task: Annotated[
        str,
        typer.Option(
            help="Questions: math500, aime, amc, gsm8k, miniature, or a file with problem and "
            "answer."
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="The InRa adapter or LoRA dial that is calibrated.")
    ] = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    data: Data = None,
    columns: Columns = None,
    instruction: Instruction = None,
    limit: Annotated[int, typer.Option(min=2, help="Only so many questions, drawn.")] = 300,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers to each question.")] = 1,
    dial: Annotated[
        str,
        typer.Option(
            help="What effort turns: adaptive (how sure a fast answer must be), lambda, or auto: "
            "adaptive if fast answers are short."
        ),
    ] = "auto",
    measure: Annotated[
        str, typer.Option(help="Of being sure: answer_probability or min_token_probability.")
    ] = "answer_probability",
    lambda_range: Annotated[
        str | None,
        typer.Option(
            help="λ that effort may use, such as -0.5,1; below 0 it thinks deeper than the "
            "reference. The adapter's own, or 0,1 for two prompts, if not given; widens it."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Loss of accuracy that the dial's own threshold may show.")
    ] = 0.02,
    temperature: TaskTemperature = None,
    top_p: TaskTopP = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    max_new_tokens: TaskMaxNewTokens = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of all sampling and of --limit's draw.")] = 0,
    workers: Workers = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Keep samples here; a broken run goes on from them."),
    ] = None,
    save_to: Annotated[
        Path | None,
        typer.Option(
            help="Write a calibrated copy of the adapter here; the adapter stays as is. Of two "
            "prompts, the folder for their calibration."
        ),
    ] = None,
    push: PushTo = None,
    private: Private = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and say what it costs; sample nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the calibration as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Measure a dial, so that --effort 50 means half of the thinking tokens.

    Effort 100 spends the tokens of λ = 0, effort 0 those of the fastest setting, and between them
    tokens follow a straight line; above 100 λ goes below 0, where the range permits it. What each
    effort costs and gets right is written into the adapter's inra_config.json, the LoRA's lora_dial.json, or
    a folder of the two prompts' own.

    The built-in miniature, into a copy of its adapter, and then used:

    [cyan]flexalign calibrate miniature --adapter miniature:fast --task miniature
    --save-to out/fast[/cyan]

    [cyan]flexalign generate miniature '9+3+6?' --adapter out/fast --effort 50[/cyan]

    Your own, with samples kept so that a broken run goes on:

    [cyan]flexalign calibrate models/R1 --adapter out/adapter --task math500 --data DIR
    --limit 500 -o out/calibration[/cyan]

    One model under two prompts, into a folder that --calibration names:

    [cyan]flexalign calibrate miniature:hybrid --aligned-prompt 'system=check ;' --task miniature
    --dial lambda --save-to out/effort[/cyan]

    [cyan]flexalign generate miniature:hybrid '9+3+6?' --aligned-prompt 'system=check ;'
    --calibration out/effort --effort 50[/cyan]

    Few questions make a coarse scale: at effort 25 the tokens have a standard error of about 10 %
    with 300 questions, and 5 % with 1500.
    """
    widened = read_range(lambda_range)
    two_prompts = read_prompt_pair(reference_prompt, aligned_prompt)
    if push is not None and two_prompts is not None:
        raise ConfigError("--push uploads an adapter, and two prompts have none; leave it out.")
    target = planned_push(push, private=private)

    from flexalign.calibration.calibrate import plan_calibration
    from flexalign.calibration.fitting import describe_loss
    from flexalign.data.columns import parse_columns
    from flexalign.evaluation.tasks import load_task

    asked = load_task(
        task,
        data=data,
        limit=limit,
        seed=seed,
        instruction=instruction,
        columns=parse_columns(columns, "--columns"),
    )
    with as_input_errors(), without_downloads(dry_run=dry_run):
        plan = plan_calibration(
            base,
            adapter,
            asked,
            prompts=two_prompts,
            save_to=save_to,
            is_stored=not dry_run,
            dial=dial,  # type: ignore[arg-type]
            measure=measure,  # type: ignore[arg-type]
            lambda_range=widened,
            margin=margin,
            samples=samples,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            dtype=dtype,
        )
    say_instruction(instruction, [asked])

    if dry_run:
        _preview(plan, as_json)
        if target is not None:
            note(f"would upload {plan.target} to {target.repo} at the end.")
        return

    if target is not None:
        target.create()
    calibration = _run(plan, output, workers)
    written = plan.store(calibration)
    if as_json:
        print_json(calibration.to_json())
    else:
        _show(calibration, "adapter" if two_prompts is None else "dial")

    console.print(f"Written to {escape(str(written))}.", soft_wrap=True)
    dial_options = ["--adapter", str(save_to or adapter)]
    if two_prompts is not None:
        dial_options = [*prompt_options(two_prompts), "--calibration", str(save_to)]
    parts = escape(shlex.join([base, *dial_options]))
    console.print(
        f"next: [cyan]flexalign serve {parts}[/cyan], to whose requests `effort` is a number and "
        "`reasoning_effort` a word now.",
        soft_wrap=True,
    )
    loss = describe_loss(calibration)
    if loss is not None:
        console.print(f"[yellow]warning:[/yellow] {escape(loss)}", soft_wrap=True)
    if target is not None:
        console.print(f"uploaded: {target.upload(plan.target)}", soft_wrap=True, markup=False)


def _preview(plan: "CalibrationPlan", as_json: bool) -> None:
    """Print what would be sampled; the second sweep runs only if the first one shows a need."""
    sweeps: list[dict[str, Any]] = [
        {"settings": [setting.id for setting in sweep.settings], "samples": sweep.total}
        for sweep in plan.sweeps.values()
    ]
    [(_, _, prompt)] = next(iter(plan.sweeps.values())).previews()
    if as_json:
        print_json({"sweeps": sweeps, "first_prompt": prompt})
        return
    console.rule("the first prompt")
    console.print(prompt, markup=False, soft_wrap=True)
    console.rule()
    for number, sweep in enumerate(sweeps):
        condition = "and, if fast answers are not short, " if number else ""
        console.print(
            f"{condition}{sweep['samples']} samples: {', '.join(sweep['settings'])}",
            markup=False,
            soft_wrap=True,
        )


def _run(plan: "CalibrationPlan", output: Path | None, workers: int) -> "Calibration":
    from flexalign.cli.console import quieten_libraries

    quieten_libraries()
    is_kept = output is not None
    with resumable_bar("samples, at most", plan.total, is_kept=is_kept) as advance:
        return plan.measure(output, workers=workers, progress=advance)


def _show(calibration: "Calibration", owner: str = "adapter") -> None:
    from flexalign.calibration.effort import show_effort
    from flexalign.calibration.fitting import describe_deeper
    from flexalign.lambdas import LAMBDA_LEGEND

    is_by_question = any(level.achieved is not None for level in calibration.levels)
    result_console.print(_levels(calibration, is_by_question))
    asked = (
        " ÷ asked: a question's tokens by those on the line between its own at effort 0 and 100, "
        "the median and in brackets the tenth and the ninetieth percentile of the questions."
    )
    result_console.print(
        f"{LAMBDA_LEGEND}; tokens: the mean; 10 % and 90 %: of single answers; accuracy in %, with "
        f"95 % intervals.{asked if is_by_question else ''}",
        style="dim",
        markup=False,
    )

    for low, high in calibration.holes:
        result_console.print(
            f"skipped: λ between {low:g} and {high:g}, less accurate than at both ends."
        )
    deeper = describe_deeper(calibration)
    if deeper is not None:
        result_console.print(deeper, markup=False, soft_wrap=True)
    if calibration.threshold is not None:
        result_console.print(
            f"the {owner}'s own threshold: {calibration.threshold:.3g} (a policy without one)."
        )

    coarse = [
        level.effort
        for level in calibration.levels
        if abs(level.metrics.tokens.mean - level.line) > _COARSE * level.line
    ]
    if coarse:
        note(
            f"at effort {', '.join(show_effort(one) for one in coarse)} no "
            "setting has the line's tokens to within 10 %; the scale has steps there."
        )


def _levels(calibration: "Calibration", is_by_question: bool) -> Table:
    """Return the table of the efforts, with what single questions took if it was measured."""
    from flexalign.calibration.effort import show_effort

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("effort", "setting"):
        table.add_column(name, justify="right" if name == "effort" else "left")
    by_question = ["÷ asked"] if is_by_question else []
    for name in ("line", "tokens", "10 %", "90 %", "accuracy", *by_question):
        table.add_column(name, justify="right")

    for level in calibration.levels:
        metrics = level.metrics
        low, share, high = metrics.accuracy
        table.add_row(
            show_effort(level.effort),
            escape(level.setting),
            f"{level.line:.1f}",
            f"{metrics.tokens.mean:.1f}",
            f"{metrics.tokens_p10:.0f}",
            f"{metrics.tokens_p90:.0f}",
            f"{100 * share:.1f} \\[{100 * low:.0f}, {100 * high:.0f}]",
            *([_ratio(level)] if is_by_question else []),
        )
    return table


def _ratio(level: "EffortLevel") -> str:
    ratio = level.achieved
    if ratio is None:
        return "—"
    return f"{ratio.median:.2f} \\[{ratio.p10:.2f}, {ratio.p90:.2f}]"
