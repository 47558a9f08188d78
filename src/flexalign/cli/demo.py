"""``flexalign demo``: see a model realigned at several λ, beside the closed form."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flexalign.cli.console import console, print_json, result_console
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from flexalign.miniature.demo import DialRow, Measurement


_LEGEND = """
eq. 5: what equation 5 gives in closed form. again: how often the model goes
over a line once more; the aligned model does it less, λ turns that further.
λ=0.5 to 5 are one LoRA, whose strength is given with each request."""

_DIAL_LEGEND = """
A layer more, trained to answer at once. λ=1 answers without thinking, adaptive
thinks where that answer is unsure (rejected answers are counted), the coin
thinks at random. over coin: accuracy above the line between slow and fast."""


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for pareto.png and demo.json.")
    ] = Path("out/demo"),
    questions: Annotated[
        int, typer.Option("--questions", min=10, help="Questions that each model answers.")
    ] = 800,
    steps: Annotated[
        int,
        typer.Option("--steps", min=1, help="Training steps of the LoRA, and of the second round."),
    ] = 120,
    seed: Annotated[int, typer.Option("--seed", help="Of questions, training and sampling.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Realign the built-in miniature once, for every λ; needs no data and no network.

    Then one adapter's dial on the same questions: mixed, adaptive, and the coin to beat.

    Two tiny models ship with flexalign: a [bold]reference[/bold] that thinks long and an
    [bold]aligned[/bold] one that errs less and repeats itself less. The demo trains one LoRA
    whose strength is λ, asks it at several λ, and adds a second round. Accuracy, tokens and
    the habit that is turned down stand beside what equation 5 gives in closed form.

    Example: [cyan]flexalign demo --output out/demo[/cyan]
    """
    if output.is_file():
        raise ConfigError(f"--output {output} is a file; name a folder.")
    output.mkdir(parents=True, exist_ok=True)

    from flexalign.miniature.demo import run_demo

    with _quiet(), _bars() as progress:
        measurements, dial = run_demo(
            output, questions=questions, steps=steps, seed=seed, progress=progress
        )
    if as_json:
        print_json(
            {
                "rows": [measurement.to_json() for measurement in measurements],
                "dial": [row.to_json() for row in dial],
            }
        )
    else:
        result_console.print(_table(measurements))
        result_console.print(_LEGEND, style="dim")
        result_console.print()
        result_console.print(_dial_table(dial))
        result_console.print(_DIAL_LEGEND, style="dim")
    console.print(f"picture: {output / 'pareto.png'}   figures: {output / 'demo.json'}")


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each task; yield a function of a task's name, items done and their total."""
    columns = (
        TextColumn("{task.description:<26}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as bars:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                if not console.is_terminal:  # bars are drawn only at the end there
                    console.print(what)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the libraries' bars and messages, which would break the demo's own bars."""
    import datasets
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        datasets.enable_progress_bars()


def _table(measurements: "list[Measurement]") -> "Table":
    table = _empty_table("The miniature, realigned", "model")
    for column in ("accuracy [95 %]", "eq. 5", "tokens", "eq. 5", "cut", "again", "eq. 5"):
        style = "dim" if column == "eq. 5" else None
        table.add_column(column, justify="right", style=style, no_wrap=True)

    reference_tokens = measurements[0].tokens
    for row in measurements:
        low, high = row.accuracy_interval
        table.add_row(
            row.name,
            f"{row.accuracy:.3f} [{low:.2f}, {high:.2f}]",
            f"{row.expected.accuracy:.3f}",
            f"{row.tokens:.1f}",
            f"{row.expected.tokens:.1f}",
            f"{1 - row.tokens / reference_tokens:.0%}",
            f"{row.habits.again:.3f}",
            f"{row.expected_habits.again:.3f}",
        )
    return table


def _dial_table(rows: "list[DialRow]") -> "Table":
    table = _empty_table("One adapter, its dial", "setting")
    for column in ("accuracy [95 %]", "tokens", "cut", "over coin [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    slow_tokens = rows[0].figures.tokens.mean
    for row in rows:
        accuracy, tokens, over = row.figures.accuracy, row.figures.tokens, row.figures.over_coin
        table.add_row(
            row.name,
            f"{accuracy.mean:.3f} [{accuracy.low:.2f}, {accuracy.high:.2f}]",
            f"{tokens.mean:.1f}",
            f"{1 - tokens.mean / slow_tokens:.0%}",
            f"{over.mean:+.3f} [{over.low:+.2f}, {over.high:+.2f}]",
        )
    return table


def _empty_table(title: str, first: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False
    )
    table.add_column(first, no_wrap=True)
    return table
