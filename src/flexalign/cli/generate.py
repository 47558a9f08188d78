"""``flexalign generate``: answers to a prompt, or a file of them, at one or several λ."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexalign.cli.console import (
    as_input_errors,
    console,
    describe_choice,
    describe_setting,
    describe_tokens,
    print_json,
    progress_bar,
    reading_input,
    result_console,
)
from flexalign.cli.options import (
    UNCHANGED_LOGITS,
    Adapter,
    Aligned,
    AlignedPrompt,
    AnyBase,
    BatchSize,
    ByID,
    Calibrated,
    Dtype,
    Gate,
    MaxNewTokens,
    Model,
    PermittedRange,
    Policies,
    ReferencePrompt,
    Temperature,
    Template,
    TopP,
    read_efforts,
    read_lambdas,
    read_prompt_pair,
    read_range,
    read_settings,
    say_efforts,
    with_logits_options,
)
from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.systems import LocalBackend, PromptRequest
    from flexalign.systems.prompts import TimedAnswer, UserPrompt


@with_logits_options
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; standard input if - or none.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Instead, a file of them: .txt with one a line, or JSONL with problem, messages or "
            "prompt (text in prompt skips the chat template).",
        ),
    ] = None,
    adapter: Adapter = None,
    aligned: Aligned = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    calibration: Calibrated = None,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            help="One or several, such as 0,0.5,1, or a schedule's JSON: 0 is the reference, 1 the "
            "aligned model or the adapter's; the adapter's default if not given (a pair: 1).",
        ),
    ] = None,
    policy: Policies = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="Or what to spend, such as 50: 0 is fastest, 100 the reference's tokens "
            "(flexalign calibrate)."
        ),
    ] = None,
    gate: Gate = None,
    lambda_range: PermittedRange = None,
    any_base: AnyBase = False,
    by_id: ByID = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    logits: LogitsSettings = UNCHANGED_LOGITS,
    max_new_tokens: MaxNewTokens = 2048,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Answers to each prompt at each setting.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="The same seed, the same answers; shared by all settings.")
    ] = 0,
    batch_size: BatchSize = 32,
    template: Template = None,
    dtype: Dtype = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a row for each answer as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Answer prompts at one λ or several, side by side, with their tokens and tokens/s.

    All λ of an adapter share one prefill of the prompt. Answers appear as soon as their batch is
    done, those to the longest prompts first; tokens/s are those of the batch. With --json they
    stand in the order of the prompts.

    One question, slow, halfway and fast:
    [cyan]flexalign generate miniature '9+3+6?' --adapter miniature:fast --lambda 0,0.5,1[/cyan]

    Think only where the fast answer is unsure:
    [cyan]flexalign generate models/R1 --adapter out/fast --policy 'adaptive 0.5' < question.txt[/cyan]

    Two models, further than the aligned one goes, many questions:
    [cyan]flexalign generate models/base --aligned models/concise --lambda 2 --gate 0.01
    --prompts questions.jsonl --json > answers.json[/cyan]

    One model, without training: as it is, told to be brief, and beyond:
    [cyan]flexalign generate smollm2 'Why is the sky blue?' --aligned-prompt
    system='Answer in one short sentence.' --lambda 0,1,1.5[/cyan]
    """
    from flexalign.cli.console import quieten_libraries, warnings_as_notes

    if samples > 1 and temperature == 0:
        raise ConfigError("--samples are all equal at temperature 0; raise --temperature.")
    limits, two_prompts = (
        read_range(lambda_range),
        read_prompt_pair(reference_prompt, aligned_prompt),
    )
    efforts = read_efforts(effort, adapter, two_prompts, calibration)
    settings = read_settings(read_lambdas(lam), policy or [], efforts)
    prompts = _read_prompts(prompt, input_file)

    from flexalign.data.prompting import parse_template
    from flexalign.lambdas import LAMBDA_LEGEND
    from flexalign.systems import LocalBackend, System, SystemOptions
    from flexalign.systems.prompts import prompt_requests

    system = System.of(model, adapter, aligned, two_prompts)
    options = SystemOptions(
        temperature=temperature,
        top_p=top_p,
        logits=logits,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        gate=gate,
        dtype=dtype,
        lambda_range=limits,
        any_base=any_base,
        by_id=by_id,
        template=parse_template(template or []),
        prompts=two_prompts,
        calibration=calibration,
    )
    quieten_libraries()
    with warnings_as_notes():
        with as_input_errors():
            backend = LocalBackend(system, settings, options)
        backend.require_dial(settings)
        say_efforts(efforts, backend.calibration)

        asked = settings or [backend.default]
        requests = prompt_requests(prompts, asked, samples=samples, seed=seed)
        made = _answer(backend, prompts, requests)
        if as_json:
            in_order = sorted(made, key=lambda one: one.place)
            print_json([one.to_json(prompts[one.request.prompt]) for one in in_order])
            return
        _show(prompts, made, backend, samples > 1)
        if backend.kind != "model":
            console.print(LAMBDA_LEGEND, style="dim")


def _read_prompts(prompt: str | None, file: Path | None) -> "list[UserPrompt]":
    """Return the prompt of the command line, those of a file, or that of standard input.

    Raises:
        ConfigError: If there is no prompt, or there are two sources.
        DataError: If a prompt is empty, or the file cannot be read.
    """
    from flexalign.systems.prompts import UserPrompt, read_prompts

    if file is not None:
        if prompt is not None:
            raise ConfigError("give PROMPT or --prompts, not both.")
        return read_prompts(file)

    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise ConfigError(
                "there is no prompt; write one behind the model, name a file of them with "
                "--prompts, or pipe one in. (flexalign chat is for conversations.)"
            )
        with reading_input():
            prompt = sys.stdin.read()
    return [UserPrompt.of_text(prompt)]


def _answer(
    backend: "LocalBackend", prompts: "Sequence[UserPrompt]", requests: "Sequence[PromptRequest]"
) -> "Iterator[TimedAnswer]":
    """Yield the answers batch by batch, and show the progress on stderr.

    Answers would break a bar on the same terminal; there, a status line is shown between batches.
    """
    from flexalign.systems.prompts import timed_answers

    for prompt in prompts:
        backend.render(prompt.messages)  # a template that refuses a prompt does so before loading
    with as_input_errors(), console.status("loading"):
        _ = backend.model

    made, total, is_shown = 0, len(requests), result_console.is_terminal
    bar: AbstractContextManager[Any] = progress_bar("answers", total)
    batches = timed_answers(backend, requests)
    with nullcontext(lambda _: None) if is_shown else bar as show:
        while True:
            with console.status(f"{made} of {total} answers") if is_shown else nullcontext():
                batch = next(batches, None)
            if batch is None:
                return
            made += len(batch)
            show(made)
            yield from batch


def _show(
    prompts: "Sequence[UserPrompt]",
    made: "Iterable[TimedAnswer]",
    backend: "LocalBackend",
    has_samples: bool,
) -> None:
    """Print each prompt and below it its answers, with their tokens and tokens/s."""
    from flexalign.cli.console import print_response

    last = None
    for _, request, answer, speed in made:
        if request.prompt != last:
            last = request.prompt
            text = prompts[last].text
            result_console.print(text, style="bold", markup=False, soft_wrap=True)
        name = describe_setting(request.setting, backend.calibration) + (
            f" · sample {request.sample + 1}" if has_samples else ""
        )
        result_console.rule(name.replace("[", "\\["), align="left", style="dim")
        print_response(answer.text, backend.text.tags)
        told = [
            describe_choice(answer, request.setting, backend.model),
            describe_tokens(answer, speed),
        ]
        for line in filter(None, told):
            result_console.print(line, style="dim", markup=False, soft_wrap=True)
