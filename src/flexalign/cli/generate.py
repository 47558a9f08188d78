"""``flexalign generate``: answers to a prompt, or a file of them, at one or several λ."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from flexalign.cli.console import (
    as_input_errors,
    console,
    describe_choice,
    describe_setting,
    describe_tokens,
    print_json,
    progress_bar,
    result_console,
)
from flexalign.cli.options import (
    Adapter,
    Aligned,
    AnyBase,
    BatchSize,
    Dtype,
    Gate,
    LambdaRange,
    MaxNewTokens,
    Model,
    Policies,
    Temperature,
    Template,
    TopP,
    read_efforts,
    read_lambdas,
    read_range,
    read_settings,
)
from flexalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flexalign.lambdas import Setting
    from flexalign.systems import Answer, Failure, LocalBackend, PromptRequest


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
    lambda_range: LambdaRange = None,
    any_base: AnyBase = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
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
    [cyan]flexalign generate miniature '3+14+15?' --adapter miniature:fast --lambda 0,0.5,1[/cyan]

    Think only where the fast answer is unsure:
    [cyan]flexalign generate models/R1 --adapter out/fast --policy 'adaptive 0.5' < question.txt[/cyan]

    Two models, further than the aligned one goes, many questions:
    [cyan]flexalign generate models/base --aligned models/concise --lambda 2 --gate 0.01
    --prompts questions.jsonl --json > answers.json[/cyan]
    """
    from flexalign.cli.console import quieten_libraries, warnings_as_notes

    if samples > 1 and temperature == 0:
        raise ConfigError("--samples are all equal at temperature 0; raise --temperature.")
    limits = read_range(lambda_range)
    settings = read_settings(read_lambdas(lam), policy or [], read_efforts(effort, adapter))
    prompts = _read_prompts(prompt, input_file)

    from flexalign.data.prompting import parse_template
    from flexalign.lambdas import LAMBDA_LEGEND
    from flexalign.systems import LocalBackend, System, SystemOptions

    system = System.of(model, adapter, aligned)
    options = SystemOptions(
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        gate=gate,
        dtype=dtype,
        lambda_range=limits,
        any_base=any_base,
        template=parse_template(template or []),
    )
    quieten_libraries()
    with as_input_errors():
        backend = LocalBackend(system, settings, options)
    backend.require_dial(settings)

    requests = _requests(prompts, settings or [backend.default], samples, seed)
    with warnings_as_notes():
        made = _answer(backend, prompts, requests)
        if as_json:
            made_all = sorted(made, key=lambda one: one.place)
            print_json([_row(prompts, one) for one in made_all])
            return
        _show(prompts, made, backend, samples > 1)
        if backend.kind != "model":
            console.print(LAMBDA_LEGEND, style="dim")


# Prompts, from an argument, standard input or a file.


class _Prompt(NamedTuple):
    """A prompt as results show it (``given``), and as the model gets it (``put``)."""

    given: str | list[dict[str, Any]]
    put: str | list[dict[str, Any]]


def _read_prompts(prompt: str | None, file: Path | None) -> list[_Prompt]:
    """Return the prompt of the command line, those of a file, or that of standard input.

    Raises:
        ConfigError: If there is no prompt, or there are two sources.
        DataError: If a prompt is empty, or the file cannot be read.
    """
    if file is not None:
        if prompt is not None:
            raise ConfigError("give PROMPT or --prompts, not both.")
        return _read_file(file)

    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise ConfigError(
                "there is no prompt; write one behind the model, name a file of them with "
                "--prompts, or pipe one in. (flexalign chat is for conversations.)"
            )
        prompt = sys.stdin.read()
    return [_question(prompt)]


def _read_file(file: Path) -> list[_Prompt]:
    if file.suffix.lower() != ".txt":
        from flexalign.data.formats import load_prompts

        return [_Prompt(one, one) for one in load_prompts(file)["prompt"]]

    if not file.is_file():
        raise DataError(f"{file}: no such file.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
    prompts = [_question(line) for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file} holds no prompt; write one a line.")
    return prompts


def _question(text: str) -> _Prompt:
    text = text.strip()
    if not text:
        raise DataError("the prompt is empty.")
    return _Prompt(text, [{"role": "user", "content": text}])


def _requests(
    prompts: Sequence[_Prompt], settings: "Sequence[Setting]", samples: int, seed: int
) -> "list[PromptRequest]":
    """Return a request per prompt, setting and sample; all settings of a sample share its seed."""
    from flexalign.data.traces import derive_seed
    from flexalign.systems import PromptRequest

    return [
        # The empty string replaces the task of a sweep; without it, every seed would change.
        PromptRequest(index, one.put, setting, sample, derive_seed(seed, "", index, sample))
        for index, one in enumerate(prompts)
        for setting in settings
        for sample in range(samples)
    ]


# Answers, batch by batch.


class _Made(NamedTuple):
    """An answer: its place among the requests, the request, and the tokens/s of its batch."""

    place: int
    request: "PromptRequest"
    answer: "Answer"
    tokens_per_second: float


def _answer(
    backend: "LocalBackend", prompts: Sequence[_Prompt], requests: "Sequence[PromptRequest]"
) -> Iterator[_Made]:
    """Yield the answers batch by batch, sorted by place within a batch."""
    for prompt in prompts:
        backend.render(prompt.put)  # a template that refuses a prompt does so before weights load
    with as_input_errors(), console.status("loading"):
        _ = backend.model

    places = {request.key: place for place, request in enumerate(requests)}
    for batch, seconds in _timed(backend.run(requests), len(requests)):
        speed = sum(answer.tokens for _, answer in batch) / seconds
        yield from sorted(_Made(places[asked.key], asked, one, speed) for asked, one in batch)


def _timed(
    batches: "Iterator[list[tuple[PromptRequest, Answer | Failure]]]", total: int
) -> "Iterator[tuple[list[tuple[PromptRequest, Answer]], float]]":
    """Yield batches and the seconds that each took, and show the progress on stderr.

    Answers would break a bar on the same terminal; there, a status line is shown between batches.
    """
    from flexalign.systems import Answer

    made, is_shown = 0, result_console.is_terminal
    bar: AbstractContextManager[Any] = progress_bar("answers", total)
    with nullcontext(lambda _: None) if is_shown else bar as show:
        while True:
            started = time.perf_counter()
            with console.status(f"{made} of {total} answers") if is_shown else nullcontext():
                found = next(batches, None)
            if found is None:
                return

            batch = [(asked, one) for asked, one in found if isinstance(one, Answer)]
            made += len(batch)
            show(made)
            yield batch, time.perf_counter() - started


def _row(prompts: Sequence[_Prompt], made: _Made) -> dict[str, Any]:
    _, request, answer, speed = made
    return {
        "prompt": prompts[request.prompt].given,
        "setting": request.setting.id,
        "lambda": request.setting.lam,
        "policy": request.setting.policy,
        "sample": request.sample,
        "response": answer.text,
        "tokens": answer.tokens,
        "thinking_tokens": answer.thinking_tokens,
        "rejected_tokens": answer.rejected_tokens,
        "truncated": answer.truncated,
        "route": answer.route,
        "confidence": answer.confidence,
        "tokens_per_second": round(speed, 1),
    }


def _show(
    prompts: Sequence[_Prompt],
    made: Iterable[_Made],
    backend: "LocalBackend",
    has_samples: bool,
) -> None:
    """Print each prompt and below it its answers, with their tokens and tokens/s."""
    from flexalign.cli.console import print_response

    last = None
    for _, request, answer, speed in made:
        if request.prompt != last:
            last = request.prompt
            given = prompts[last].given
            text = given if isinstance(given, str) else "\n".join(m["content"] for m in given)
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
