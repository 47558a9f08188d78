"""``flexalign compare``: several sweeps side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flexalign.cli.console import console, note, print_json
from flexalign.cli.evaluate import print_summary


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders that flexalign evaluate wrote."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write report.html and pareto.png of all of them into this folder.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Put the results of several sweeps into one table, and with --output into one report.

    Figures stand side by side as each sweep measured them; the folders are not changed.

    Example: [cyan]flexalign compare out/sweep out/dial --output out/both[/cyan]
    """
    from flexalign.evaluation.summary import compare as put_side_by_side

    merged = put_side_by_side(folders)
    for text in (merged.environment or {}).get("notes", ()):
        note(text)
    if output:
        from flexalign.evaluation.report import write_report

        console.print(f"The report: {escape(str(write_report(folders, output)))}")
    if as_json:
        print_json(merged.to_json())
    else:
        print_summary(merged)
