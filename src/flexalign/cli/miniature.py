"""``flexalign miniature``: make the small world's questions, traces and models."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flexalign.cli.console import console
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
