"""``flexalign compare``: several sweeps side by side."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flexalign.cli._evaluate import print_summary
from flexalign.cli.console import console, print_json
from flexalign.errors import ConfigError
from flexalign.evaluation.systems import tell_apart


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
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ConfigError("a folder is named twice; name each once.")
    rows, means = [], []
    for folder, label in zip(folders, tell_apart(resolved), strict=True):
        own_rows, own_means = _read(folder, label)
        rows += own_rows
        means += own_means
    merged = {"rows": rows, "means": means}
    if output:
        from flexalign.evaluation.report import write_report

        console.print(f"The report: {escape(str(write_report(folders, output)))}")
    if as_json:
        print_json(merged)
    else:
        print_summary(merged)


def _read(folder: Path, label: str) -> list[list[dict[str, Any]]]:
    """Return the rows and the means of a sweep, its systems named after its folder too."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return [
            [row | {"system": f"{label}/{row['system']}"} for row in summary[part]]
            for part in ("rows", "means")
        ]
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no summary.json; give the --output of flexalign evaluate, and finish "
            "its run first."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}); write it anew with: flexalign evaluate --regrade "
            f"--output {folder}"
        ) from error
