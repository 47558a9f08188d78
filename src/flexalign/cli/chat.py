"""``flexalign chat``: a conversation in which the dial can be turned."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.markup import escape

from flexalign.cli.console import (
    ResponsePrinter,
    as_input_errors,
    console,
    describe_choice,
    describe_setting,
    describe_tokens,
    reading_input,
)
from flexalign.cli.options import (
    UNCHANGED_LOGITS,
    Adapter,
    Aligned,
    AlignedPrompt,
    AnyBase,
    ByID,
    Calibrated,
    Dtype,
    Gate,
    MaxNewTokens,
    Model,
    PermittedRange,
    ReferencePrompt,
    Temperature,
    Template,
    TopP,
    read_efforts,
    read_lambdas,
    read_prompt_pair,
    read_range,
    read_setting,
    read_settings,
    say_efforts,
    with_logits_options,
)
from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError, FlexAlignError

if TYPE_CHECKING:
    from flexalign.lambdas import Setting
    from flexalign.systems import Conversation, LocalBackend

EffortReader: TypeAlias = "Callable[[str | None], list[Setting]]"
"""Reads efforts by the calibration of a conversation's dial."""

_HELP = """\
/lambda 0.3          λ from the next answer on, or a schedule's JSON; 0 is the reference, 1 the
                     aligned model or the adapter's
/policy adaptive 0.5 think only where the fast answer is unsure; or exit 0.95, route 0.3,
                     auto, JSON
/effort 50           0 is fastest, 100 the reference's tokens; the dial must be calibrated
/system TEXT         what the model is told beforehand; alone: nothing
/reset               forget the conversation
/quit                leave, as Ctrl-D does; Ctrl-C stops an answer"""


@with_logits_options
def chat(
    model: Model,
    adapter: Adapter = None,
    aligned: Aligned = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    calibration: Calibrated = None,
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
            help="Instead: 'adaptive 0.5', 'exit 0.95', 'route 0.3', auto, or JSON of a policy or a schedule."
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
    lambda_range: PermittedRange = None,
    any_base: AnyBase = False,
    by_id: ByID = False,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    logits: LogitsSettings = UNCHANGED_LOGITS,
    max_new_tokens: MaxNewTokens = 2048,
    seed: Annotated[int, typer.Option(help="Of all sampling.")] = 0,
    template: Template = None,
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

    Example: [cyan]flexalign chat models/hybrid --aligned-prompt enable_thinking=false --lambda 0.5[/cyan]
    """
    limits, two_prompts = (
        read_range(lambda_range),
        read_prompt_pair(reference_prompt, aligned_prompt),
    )
    policies = [policy] if policy is not None else []
    read = partial(read_efforts, adapter=adapter, prompts=two_prompts, calibration=calibration)
    efforts = read(effort)
    settings = read_settings(read_lambdas(lam), policies, efforts)
    if len(settings) > 1:
        raise ConfigError("a conversation begins with one setting; give one λ, policy or effort.")

    from flexalign.cli.console import quieten_libraries, warnings_as_notes
    from flexalign.data.prompting import parse_template
    from flexalign.systems import Conversation, LocalBackend, System, SystemOptions

    named = System.of(model, adapter, aligned, two_prompts)
    options = SystemOptions(
        temperature=temperature,
        top_p=top_p,
        logits=logits,
        max_new_tokens=max_new_tokens,
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
            backend = LocalBackend(named, settings, options)
        backend.require_dial(settings)
        say_efforts(efforts, backend.calibration)

        with as_input_errors(), console.status("loading"):
            _ = backend.model
        setting = settings[0] if settings else backend.default
        console.print(
            f"{escape(_describe_start(setting, backend))}. /help lists the commands; Ctrl-D leaves."
        )
        _converse(Conversation(backend, options, setting, seed, system), read)


def _describe_start(setting: "Setting", backend: "LocalBackend") -> str:
    """Return the first setting of a conversation, what its λ means, and the permitted range."""
    if backend.kind == "model":
        return "The plain model, which has no dial"
    ends = {
        "dial": "0 is the base model, 1 the adapter whole",
        "pair": "0 is the reference, 1 the aligned model",
        "prompts": "0 is the reference's prompt, 1 the aligned prompt",
    }
    start = f"{describe_setting(setting, backend.calibration)}; λ: {ends[backend.kind]}"
    if backend.permitted is None:
        return start
    low, high = backend.permitted
    return f"{start}; it may go from {low:g} to {high:g}"


def _converse(conversation: "Conversation", read: EffortReader) -> None:
    """Answer each line, or execute it if it is a command, until /quit or the end of the input.

    Args:
        conversation: The conversation.
        read: Reads efforts by the calibration of its dial.
    """
    for line in _lines():
        try:
            if not line.startswith("/"):
                _ask(conversation, line)
            elif not _execute(conversation, line, read):
                return
        except FlexAlignError as error:
            console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)


def _ask(conversation: "Conversation", text: str) -> None:
    """Print the answer while it is written, and below it its setting and tokens."""
    printer = ResponsePrinter(conversation.backend.text.tags)
    try:
        reply = conversation.ask(text, printer.write)
    finally:
        printer.end()

    if reply.answer is None:
        console.print("stopped", style="dim")
    else:
        setting, backend = conversation.setting, conversation.backend
        parts = [
            describe_setting(setting, backend.calibration),
            describe_choice(reply.answer, setting, backend.model),
            describe_tokens(reply.answer, reply.answer.tokens / reply.seconds),
        ]
        line = " · ".join(part for part in parts if part)
        console.print(line, style="dim", markup=False, soft_wrap=True)
    if not reply.is_kept:
        console.print("no answer came after the thinking; the question is not kept.")


def _execute(conversation: "Conversation", line: str, read: EffortReader) -> bool:
    """Execute a command; return whether the conversation continues.

    Raises:
        ConfigError: If there is no such command, or its value is malformed.
        LambdaError: If it is a λ that is not finite, or outside the range.
    """
    name, _, value = line[1:].partition(" ")
    value = value.strip()

    match name:
        case "quit":
            return False
        case "help":
            console.print(_HELP, markup=False)
        case "reset":
            conversation.turns.clear()
            console.print("The conversation is forgotten.")
        case "system":
            conversation.system = value
            console.print("The system prompt is set." if value else "No system prompt.")
        case "lambda" | "policy" | "effort":
            if value:
                conversation.turn_to(_read_setting(name, value, read))
            setting, calibration = conversation.setting, conversation.backend.calibration
            told = describe_setting(setting, calibration)
            if name == "effort" and value:
                console.print(f"effort {setting.effort:g}: {told}", markup=False)
            console.print(told, markup=False)
        case _:
            raise ConfigError(f"there is no command /{name}; /help lists them.")
    return True


def _read_setting(name: str, value: str, read: EffortReader) -> "Setting":
    if name != "effort":
        return read_setting(name, value)
    settings = read(value)
    if len(settings) != 1:
        raise ConfigError(f"a conversation has one effort at a time; got {value!r}.")
    return settings[0]


def _lines() -> Iterator[str]:
    """Yield the lines of the input, typed or piped, without empty ones."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with suppress(ImportError):  # not every Python is built with it
            import readline  # noqa: F401 (gives input() its editing and its history)
    while True:
        try:
            with reading_input():
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
