"""Options that several commands take, each said once: what they are called and what they mean."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from flexalign.errors import ConfigError

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class EngineName(StrEnum):
    """What runs a model."""

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

Model: TypeAlias = Annotated[str, typer.Argument(help="A model folder or a known name.")]
Adapter: TypeAlias = Annotated[
    str | None, typer.Option(help="An InRa adapter on the model: its dial.")
]
Aligned: TypeAlias = Annotated[
    str | None, typer.Option(help="Or the aligned model of a pair, fused as both decode.")
]
Gate: TypeAlias = Annotated[
    float | None, typer.Option(help="Extrapolate only where the two differ by more.")
]
LambdaRange: TypeAlias = Annotated[
    str | None,
    typer.Option(help="λ to permit, such as -1,2; else an adapter's own, and a pair's λ ≥ 0."),
]
AnyBase: TypeAlias = Annotated[
    bool, typer.Option("--any-base", help="Take an adapter that was made for another base.")
]
Dtype: TypeAlias = Annotated[
    str, typer.Option(callback=known_dtype, help="auto, float32, bfloat16 or float16.")
]

Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy.")]
TopP: TypeAlias = Annotated[float, typer.Option(help="Probability mass sampled from.")]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="Tokens at which an answer is cut off.")]
BatchSize: TypeAlias = Annotated[int, typer.Option(min=1, help="Answers made together.")]

Policies: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="'adaptive 0.5', 'route 0.3', auto, or JSON of a policy or a schedule; repeatable.",
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
