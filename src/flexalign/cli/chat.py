"""``flexalign chat``: a conversation in which the dial can be turned."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flexalign.cli._dial import (
    describe_start,
    open_dial,
    read_efforts,
    read_lambdas,
    read_range,
    read_settings,
)
from flexalign.cli.console import as_input_errors, console
from flexalign.cli.options import (
    Adapter,
    Aligned,
    AnyBase,
    Dtype,
    Gate,
    LambdaRange,
    MaxNewTokens,
    Model,
    Temperature,
    TopP,
)
from flexalign.errors import ConfigError, FlexAlignError

if TYPE_CHECKING:
    from flexalign.cli._chat import Chat


def chat(
    model: Model,
    adapter: Adapter = None,
    aligned: Aligned = None,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            help="To begin with: 0 is the reference, 1 the aligned model or the adapter's; the "
            "adapter's default if not given (a pair: 1).",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Instead: 'adaptive 0.5', 'route 0.3', auto, or JSON of a policy or a schedule."
        ),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="Instead: 0 is fastest, 100 the reference's tokens (flexalign calibrate)."
        ),
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told beforehand.")] = "",
    gate: Gate = None,
    lambda_range: LambdaRange = None,
    any_base: AnyBase = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    max_new_tokens: MaxNewTokens = 2048,
    seed: Annotated[int, typer.Option(help="Of all sampling.")] = 0,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model and turn its dial in mid-conversation.

    Answers go to stdout as they are written, thinking dimmed; what they cost, and which way a
    policy took and why, to stderr. Lines may be piped in. Inside: [cyan]/lambda 0.3[/cyan],
    [cyan]/policy adaptive 0.5[/cyan], [cyan]/effort 50[/cyan], [cyan]/system TEXT[/cyan],
    [cyan]/reset[/cyan], [cyan]/help[/cyan], [cyan]/quit[/cyan]. Ctrl-C stops an answer, Ctrl-D leaves. The model is
    not shown the thinking of its earlier answers.

    Example: [cyan]flexalign chat miniature --adapter miniature:fast --policy 'adaptive 0.5'[/cyan]

    Example: [cyan]flexalign chat models/base --aligned models/concise --lambda 1.5[/cyan]
    """
    limits = read_range(lambda_range)
    policies = [policy] if policy is not None else []
    settings = read_settings(read_lambdas(lam), policies, read_efforts(effort, adapter))
    if len(settings) > 1:
        raise ConfigError("a conversation begins with one setting; give one λ, policy or effort.")

    from flexalign.cli.console import quieten_libraries, warnings_as_notes
    from flexalign.evaluation.systems import SystemOptions

    options = SystemOptions(
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        gate=gate,
        dtype=dtype,
        lambda_range=limits,
        any_base=any_base,
    )
    quieten_libraries()
    backend = open_dial(model, adapter, aligned, settings, options)
    from flexalign.cli._chat import Chat

    with warnings_as_notes():
        with as_input_errors(), console.status("loading"):
            _ = backend.model
        setting = settings[0] if settings else backend.default
        console.print(
            f"{escape(describe_start(setting, backend))}. /help lists the commands; Ctrl-D leaves."
        )
        _converse(Chat(backend, options, setting, seed, system, adapter))


def _converse(chat: "Chat") -> None:
    for line in _lines():
        try:
            if line.startswith("/"):
                if not chat.obey(line):
                    return
            else:
                chat.say(line)
        except FlexAlignError as error:
            console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)


def _lines() -> Iterator[str]:
    """Give what is typed or piped in, line by line, empty ones left out."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with suppress(ImportError):  # not every Python is built with it
            import readline  # noqa: F401 (gives input() its editing and its history)
    while True:
        try:
            line = input("› ") if is_typed else _piped_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /quit leaves.")
            continue
        if line.strip():
            yield line.strip()


def _piped_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
