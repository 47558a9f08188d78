"""Options that several commands share, and how λ is read from the command line.

Only this module parses a λ of the command line; its functions return dials and settings.
"""

import inspect
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from flexalign.cli.console import as_input_errors, describe_setting, say
from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError, FlexAlignError
from flexalign.lambdas import (
    AnyDial,
    Fixed,
    Setting,
    TrainingLambda,
    parse_any_dial,
    parse_lambdas,
    parse_range,
    parse_training_lambda,
    unique_settings,
)

if TYPE_CHECKING:
    from flexalign.models.prompted import PromptPair

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class EngineName(StrEnum):
    """The engine that runs a model."""

    LOCAL = "local"
    VLLM = "vllm"


def known_dtype(name: str) -> str:
    """Check ``--dtype`` before anything is loaded.

    Raises:
        ConfigError: If there is no such precision.
    """
    if name not in _DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(_DTYPES)}, got {name!r}.")
    return name


Recipe: TypeAlias = Annotated[Path, typer.Argument(help="YAML file; the keys are described above.")]
RecipeOutput: TypeAlias = Annotated[
    str | None, typer.Option("--output", "-o", help="Output folder instead of the recipe's.")
]
Assignments: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other key, such as training.max_steps=100; repeatable."),
]
SkipBadRows: TypeAlias = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used.")
]
Columns: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        help="FIELD=COLUMN, the file's own name for a field, such as problem=query; repeatable.",
    ),
]
DryTraining: TypeAlias = Annotated[
    bool,
    typer.Option("--dry-run", help="Show samples, sizes, steps and memory; load no weights."),
]
ResultAsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, alone, on stdout.")
]

AllowPickle: TypeAlias = Annotated[
    bool, typer.Option("--allow-pickle", help="Permit pickled weights, which can run code.")
]

PushTo: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="ORG/NAME",
        help="Upload the finished folder to this repository of the hub.",
    ),
]
Private: TypeAlias = Annotated[
    bool, typer.Option("--private", help="The repository of --push is private; made so if new.")
]

Model: TypeAlias = Annotated[
    str, typer.Argument(help="A model's folder, hub id (org/name[@revision]) or known name.")
]
Adapter: TypeAlias = Annotated[
    str | None, typer.Option(help="The model's dial: an InRa adapter, a LoRA dial or a PEFT LoRA.")
]
Aligned: TypeAlias = Annotated[
    str | None, typer.Option(help="Or the aligned model of a pair, fused as both decode.")
]
Gate: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Extrapolate only where the two differ by more; a LoRA dial, which has no second "
        "distribution, refuses it."
    ),
]
PermittedRange: TypeAlias = Annotated[
    str | None,
    typer.Option(help="λ to permit, such as -1,2; else an adapter's own, and a pair's λ ≥ 0."),
]
ByID: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--by-id",
        help="Of two models: take special tokens that differ in name alone for the same; the "
        "reference's names are used.",
    ),
]
AnyBase: TypeAlias = Annotated[
    bool, typer.Option("--any-base", help="Take an adapter that was made for another base.")
]
Template: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        metavar="KEY=VALUE",
        help="An argument of the chat template, such as enable_thinking=false; repeatable.",
    ),
]
ReferencePrompt: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--reference-prompt",
        metavar="KEY=VALUE",
        help="As --aligned-prompt, for λ = 0; without it, the model as it is.",
    ),
]
AlignedPrompt: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--aligned-prompt",
        metavar="KEY=VALUE",
        help="Or the model itself under another prompt: system=TEXT, or an argument of its chat "
        "template, such as enable_thinking=false; repeatable.",
    ),
]
Calibrated: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FOLDER",
        help="Of the two prompts, what flexalign calibrate wrote: their efforts.",
    ),
]
Dtype: TypeAlias = Annotated[
    str, typer.Option(callback=known_dtype, help="auto, float32, bfloat16 or float16.")
]

Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy.")]
TopP: TypeAlias = Annotated[float, typer.Option(help="Probability mass sampled from.")]
TopK: TypeAlias = Annotated[int, typer.Option(help="Likeliest tokens sampled from; 0: all.")]
MinP: TypeAlias = Annotated[
    float, typer.Option(help="Least probability, as a share of the likeliest token's; 0: none.")
]
RepetitionPenalty: TypeAlias = Annotated[
    float, typer.Option(help="Of tokens in the prompt or the answer, above 0; 1: none.")
]
PresencePenalty: TypeAlias = Annotated[
    float, typer.Option(help="Subtracted from the logits of tokens in the answer.")
]
FrequencyPenalty: TypeAlias = Annotated[
    float, typer.Option(help="Subtracted for each time that a token is in the answer.")
]
ThinkingBudget: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Tokens of thinking after which the thinking is closed, as the template closes it.",
    ),
]
EndOfThinkingBias: TypeAlias = Annotated[
    float,
    typer.Option(
        help="Added to the logit of the token that closes the thinking, inside it; above 0 the "
        "thinking ends sooner."
    ),
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="Tokens at which an answer is cut off.")]
BatchSize: TypeAlias = Annotated[int, typer.Option(min=1, help="Answers made together.")]

ServerModel: TypeAlias = Annotated[
    str | None,
    typer.Option("--model-name", help="The model's name at a server; else its only one."),
]
ServerKey: TypeAlias = Annotated[
    str | None,
    typer.Option("--api-key-env", help="Environment variable that holds a server's key."),
]
Concurrency: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Requests under way at a server at one time.")
]
Timeout: TypeAlias = Annotated[float, typer.Option(help="Seconds to wait for one response.")]
Attempts: TypeAlias = Annotated[int, typer.Option(min=1, help="Tries per request.")]

Policies: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="'adaptive 0.5', 'exit 0.95', 'route 0.3', auto, or JSON of a policy or a schedule; repeatable.",
    ),
]
OneTask: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Questions: math500, aime, amc, gsm8k, miniature, or a file with problem and answer.",
    ),
]
Data: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder of the public files; else FLEXALIGN_DATA.")
]
Instruction: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="What stands below every question; '' for nothing. By default the public tasks "
        "ask for the answer in \\boxed{}, the miniature and your own files for nothing."
    ),
]
TaskTemperature: TypeAlias = Annotated[
    float | None,
    typer.Option(help="0 is greedy; by default the task's own, 0.7 (miniature: 1)."),
]
TaskTopP: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Probability mass sampled from; by default the task's own, 0.95 (miniature: 1)."
    ),
]
TaskMaxNewTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Tokens at which an answer is cut off; by default the task's own, 16384 (miniature: "
        "1000)."
    ),
]
Workers: TypeAlias = Annotated[int, typer.Option(min=1, help="Processes that grade.")]


# Options that a mode of a command does not read.


def refuse_options(
    context: typer.Context,
    where: str,
    *,
    of: Collection[str] = (),
    besides: Collection[str] | None = None,
) -> None:
    """Refuse options and arguments that are given and would have no effect.

    One that is given with its default value is not refused.

    Args:
        context: The context of the command.
        where: Where they have no effect, for the message, such as ``without --diff``.
        of: The parameters of the command that have none there.
        besides: Instead, the only ones that have an effect there.

    Raises:
        ConfigError: If one is given; the message names the first.
    """
    known = {str(parameter.name): parameter for parameter in context.command.params}
    wrong = set(besides or of) - set(known)
    if wrong:
        raise LookupError(f"{context.command.name} has no {', '.join(sorted(wrong))}")

    refused = set(of) if besides is None else set(known) - set(besides)
    for name, parameter in known.items():
        source = context.get_parameter_source(name)
        is_given = source is not None and source.name == "COMMANDLINE"
        if name in refused and is_given and context.params[name] != parameter.default:
            is_option = parameter.param_type_name == "option"
            shown = parameter.opts[0] if is_option else name.upper()
            raise ConfigError(f"{shown} has no meaning {where}; leave it out.")


# The options of the logits, which commands take together.

UNCHANGED_LOGITS = LogitsSettings()
"""The default of a command's parameter ``logits``."""


def with_logits_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`_read_logits` in place of its parameter ``logits``.

    The command itself is called with the settings that are read from them.
    """
    signature = inspect.signature(command)
    options = inspect.signature(_read_logits).parameters

    @wraps(command)
    def run(**given: Any) -> None:
        logits = _read_logits(**{name: given.pop(name) for name in options})
        command(**given, logits=logits)

    shown: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        shown += options.values() if parameter.name == "logits" else [parameter]
    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return run


def _read_logits(
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    thinking_budget: ThinkingBudget = None,
    end_of_thinking_bias: EndOfThinkingBias = 0.0,
) -> LogitsSettings:
    return LogitsSettings(
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        thinking_budget=thinking_budget,
        end_of_thinking_bias=end_of_thinking_bias,
    )


# Reading the options of the dial.


def read_lambdas(text: str | None) -> list[AnyDial]:
    """Read ``--lambda 0,0.5,1``, or a schedule's JSON in its place.

    Raises:
        ConfigError: If the schedule is malformed.
        LambdaError: If a λ is not a finite number.
    """
    if text is None:
        return []
    return [parse_any_dial(text)] if text.lstrip().startswith("{") else [*parse_lambdas(text)]


def read_settings(
    lambdas: Sequence[AnyDial], policies: Sequence[str], efforts: Sequence[Setting] = ()
) -> list[Setting]:
    """Make settings of ``--lambda``, every ``--policy`` and ``--effort``.

    Args:
        lambdas: The result of :func:`read_lambdas`.
        policies: The values of ``--policy``.
        efforts: The result of :func:`read_efforts`.

    Raises:
        ConfigError: If a policy is malformed, or a setting is given twice.
        LambdaError: If a λ in one is not a finite number.
    """
    return unique_settings([*lambdas, *policies, *efforts])


def read_setting(name: str, text: str) -> Setting:
    """Read one setting of a conversation's command, in the form of ``--lambda`` or ``--policy``.

    Args:
        name: ``lambda`` or ``policy``.
        text: The option's value.

    Raises:
        ConfigError: If it is malformed, or several.
        LambdaError: If a λ is not a finite number.
    """
    if name == "policy" or text.startswith("{"):
        return Setting.of(text)
    try:
        return Setting.of(Fixed(float(text)))
    except ValueError:  # LambdaError is one too
        raise ConfigError(f"/lambda takes one finite number, such as 0.3; got {text!r}.") from None


def read_prompt_pair(
    reference: Sequence[str] | None, aligned: Sequence[str] | None
) -> "PromptPair | None":
    """Read ``--reference-prompt`` and ``--aligned-prompt``; None if neither is given.

    Raises:
        ConfigError: If one has another form than ``system=TEXT`` or ``KEY=VALUE``.
    """
    if not reference and not aligned:
        return None
    from flexalign.data.prompting import parse_prompt
    from flexalign.models.prompted import PromptPair

    return PromptPair(
        parse_prompt(reference or [], "--reference-prompt"),
        parse_prompt(aligned or [], "--aligned-prompt"),
    )


def read_side_prompts(
    reference: Sequence[str] | None, aligned: Sequence[str] | None
) -> dict[str, Any]:
    """Read the two options for a recipe, as `RealignRecipe.load_each` takes them; each may be absent.

    Raises:
        ConfigError: As in :func:`read_prompt_pair`.
    """
    read = read_prompt_pair(reference, aligned)
    if read is None:
        return {}
    given = {"reference_prompt": reference, "aligned_prompt": aligned}
    return {
        name: getattr(read, name.removesuffix("_prompt")) for name, texts in given.items() if texts
    }


def prompt_options(prompts: "PromptPair | None") -> list[str]:
    """Return the words of the command line that give two prompts."""
    if prompts is None:
        return []
    words = []
    for option, prompt in (
        ("--reference-prompt", prompts.reference),
        ("--aligned-prompt", prompts.aligned),
    ):
        given = [] if prompt.system is None else [f"system={prompt.system}"]
        given += [f"{name}={json.dumps(value)}" for name, value in prompt.template.items()]
        words += [word for text in given for word in (option, text)]
    return words


def read_efforts(
    text: str | None,
    adapter: str | None,
    prompts: "PromptPair | None" = None,
    calibration: Path | None = None,
) -> list[Setting]:
    """Read ``--effort 0,50,100`` by a dial's calibration; :func:`say_efforts` prints the settings.

    Args:
        text: The option's value.
        adapter: The adapter; None if there is none.
        prompts: The two prompts of the model; None if it has not two.
        calibration: The folder with their calibration. Whether it is of this model and of these
            prompts is checked where the model is opened.

    Raises:
        ConfigError: If it is not numbers, there is no dial, it has not been calibrated, or an
            effort lies outside what calibration covers.
    """
    if text is None:
        return []
    if adapter is None and prompts is None:
        raise ConfigError(
            "--effort needs an InRa adapter or a LoRA dial that flexalign calibrate has measured, or "
            "two prompts and their --calibration; name it, or give --lambda."
        )
    folder = adapter or calibration
    if folder is None:
        raise ConfigError(
            "--effort of two prompts has no meaning before calibration; run flexalign calibrate MODEL "
            "--aligned-prompt … --task TASK --save-to FOLDER and give --calibration FOLDER, or give "
            "--lambda."
        )
    from flexalign.calibration.effort import Calibration, effort_settings
    from flexalign.generation.two_prompt_config import TwoPromptConfig
    from flexalign.systems.dials import read_dial

    with as_input_errors():
        if adapter is not None:
            stored = read_dial(adapter).calibration
        else:
            stored = TwoPromptConfig.load(Path(folder)).calibration
    efforts = []
    for part in text.split(","):
        try:
            efforts.append(float(part))
        except ValueError:
            raise ConfigError(
                f"--effort: {part.strip()!r} is not a number; write one, such as 50, or several "
                "with commas."
            ) from None

    return effort_settings(Calibration.from_json(stored), efforts)


def say_efforts(efforts: Sequence[Setting], calibration: Mapping[str, Any] | None) -> None:
    """Print the setting of each effort, once the model is known to be the calibration's.

    Args:
        efforts: The result of :func:`read_efforts`.
        calibration: The calibration that the opened system has.
    """
    for setting in efforts:
        say(f"effort {setting.effort:g}: {describe_setting(setting, calibration)}")


def read_range(text: str | None) -> tuple[float, float] | None:
    """Read ``--lambda-range -1,2``.

    Raises:
        LambdaError: If it is not two numbers in order.
    """
    return None if text is None else parse_range(text)


def parse_lambda_option(text: str | None) -> Fixed | list[Fixed] | TrainingLambda | None:
    """Read ``--lambda`` of a training command: a number, several, a range, JSON, or none.

    Raises:
        ConfigError: If it is a schedule that is malformed.
        LambdaError: If it is none of these.
    """
    if text is None:
        return None
    if text.lstrip().startswith("{") or ":" in text:
        try:
            return parse_training_lambda(text)
        except FlexAlignError as error:
            raise type(error)(f"--lambda: {error}") from error
    values = parse_lambdas(text)
    return values[0] if len(values) == 1 else values


def read_secret(variable: str | None) -> str | None:
    """Read the environment variable that ``--api-key-env`` names.

    Raises:
        ConfigError: If it is not set.
    """
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise ConfigError(f"--api-key-env: the environment variable {variable!r} is not set.")
    return value
