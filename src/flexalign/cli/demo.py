"""``flexalign demo``: see a model realigned at several λ, beside the closed form."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexalign.cli._shared import console, print_json, result_console
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.evaluation.showcase import Measurement


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for pareto.png and demo.json.")
    ] = Path("out/demo"),
    questions: Annotated[
        int, typer.Option("--questions", min=10, help="Questions that each model answers.")
    ] = 300,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Training steps of each student.")
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Of questions, training and sampling.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Realign the built-in miniature at λ = 1 and 2, and twice over; needs no data and no network.

    Two tiny models ship with flexalign: a [bold]reference[/bold] that thinks long and an
    [bold]aligned[/bold] one that errs less and repeats itself less. The demo trains a student at
    each λ, lets every model answer the same questions, and holds accuracy, tokens and the habit
    that was turned down against what equation 5 gives in closed form.

    Example: [cyan]flexalign demo --output out/demo[/cyan]
    """
    if output.is_file():
        raise ConfigError(f"--output {output} is a file; name a folder.")
    output.mkdir(parents=True, exist_ok=True)

    from flexalign.cli._demo import run_demo

    measurements = run_demo(output, questions=questions, steps=steps, seed=seed)
    if as_json:
        print_json([measurement.to_json() for measurement in measurements])
    else:
        result_console.print(_table(measurements))
    console.print(f"picture: {output / 'pareto.png'}   figures: {output / 'demo.json'}")


def _table(measurements: "list[Measurement]") -> "object":
    from rich.table import Table

    table = Table(title="The miniature, realigned (in brackets: equation 5 in closed form)")
    for column in ("model", "accuracy", "95 % interval", "tokens", "token cut", "goes over again"):
        table.add_column(column, justify="left" if column == "model" else "right")
    reference_tokens = measurements[0].tokens
    for row in measurements:
        assert row.expected is not None
        assert row.expected_habits is not None
        low, high = row.accuracy_interval
        table.add_row(
            row.name,
            f"{row.accuracy:.3f} ({row.expected.accuracy:.3f})",
            f"{low:.3f}–{high:.3f}",
            f"{row.tokens:.1f} ({row.expected.tokens:.1f})",
            f"{1 - row.tokens / reference_tokens:.0%}",
            f"{row.habits.again:.3f} ({row.expected_habits.again:.3f})",
        )
    return table
