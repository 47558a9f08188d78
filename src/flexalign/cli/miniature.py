"""``flexalign miniature``: make the small world's questions, traces and models."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flexalign.cli.console import console, result_console
from flexalign.errors import ConfigError

miniature = typer.Typer(
    name="miniature",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="The small world with a known answer: its questions, traces and models.",
)

_Output = Annotated[Path, typer.Option("--output", "-o", help="File to write; never overwritten.")]
_Count = Annotated[int, typer.Option("--count", "-n", min=1, help="How many rows.")]
_Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same rows.")]


@miniature.command()
def questions(output: _Output, count: _Count = 300, seed: _Seed = 0) -> None:
    """Write questions with their answers, as JSON Lines.

    Example: [cyan]flexalign miniature questions -o questions.jsonl -n 500[/cyan]
    """
    from flexalign.miniature import make_questions

    rows = make_questions(count, seed)
    _write_rows(output, [{"problem": row.text, "answer": str(row.answer)} for row in rows])


@miniature.command()
def traces(
    output: _Output,
    count: _Count = 2000,
    seed: _Seed = 0,
    style: Annotated[
        str, typer.Option("--style", help="Whose way of thinking: reference or aligned.")
    ] = "reference",
) -> None:
    """Write questions with the traces of the reference's or the aligned way of thinking.

    Example: [cyan]flexalign miniature traces -o traces.jsonl -n 2000[/cyan]
    """
    from flexalign.miniature import ALIGNED, REFERENCE, make_traces

    styles = {"reference": REFERENCE, "aligned": ALIGNED}
    if style not in styles:
        raise ConfigError(f"--style {style!r} is not known; take reference or aligned.")
    _write_rows(output, make_traces(count, seed, styles[style]))


@miniature.command()
def build(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the models, one folder each.")
    ],
    seed: Annotated[int, typer.Option("--seed", help="Of initial weights and data.")] = 0,
    placebo: Annotated[
        bool,
        typer.Option("--placebo", help="Also the control: trained on with the reference's data."),
    ] = False,
) -> None:
    """Make the models that ship with the package again, from nothing (about 40 minutes).

    Example: [cyan]flexalign miniature build --seed 0 --output weights[/cyan]
    """
    from flexalign.miniature.build import build_all

    for part in build_all(output, seed=seed, placebo=placebo):
        console.print(f"wrote {output / part}")


@miniature.command()
def align(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the aligned model.")],
    method: Annotated[
        str, typer.Option("--method", help="grpo: reinforcement learning by TRL. sft: on traces.")
    ] = "grpo",
    seed: Annotated[int, typer.Option("--seed", help="Of training data and of all sampling.")] = 0,
    cost: Annotated[
        float | None,
        typer.Option("--cost", help="grpo: of each token, where a right answer is worth 1."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps, instead of the method's own.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            help="grpo: right (less the cost of the tokens), or a control: constant or random.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--questions", min=2, help="How many questions it is measured on.")
    ] = 1000,
) -> None:
    """Align the reference by reinforcement learning or on traces, and measure what changed.

    The folder is an ordinary model, with its accuracy, tokens and habits in its card.

    Example: [cyan]flexalign miniature align --method grpo --seed 0 -o rl[/cyan]
    """
    from flexalign.miniature import align as alignment

    options = alignment.alignment_options(method, cost, steps, reward)
    record = alignment.align(output, options, seed=seed, questions=count)

    table = Table("", "reference", "aligned", "change", box=None, pad_edge=False)
    for row in alignment.comparison(record):
        table.add_row(*map(escape, row))
    result_console.print(table)
    console.print(f"wrote {output}")


@miniature.command()
def forms(
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write.")],
) -> None:
    """Draw where equation 5 departs from the sequence-level optimum that it approximates.

    Example: [cyan]flexalign miniature forms -o forms.png[/cyan]
    """
    from flexalign.miniature.picture import draw_forms

    draw_forms(output)
    console.print(f"wrote {output}")


def _write_rows(output: Path, rows: list[dict[str, object]]) -> None:
    if output.exists():
        raise ConfigError(f"{output} is there already; move it away or name another --output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    output.write_text(text, encoding="utf-8")
    console.print(f"wrote {len(rows)} rows to {output}")
