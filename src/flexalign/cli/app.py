"""The ``flexalign`` command: a table of commands, and what happens when one fails."""

import sys
from typing import Annotated

import typer

from flexalign._version import __version__
from flexalign.cli._shared import console
from flexalign.errors import FlexAlignError

app = typer.Typer(
    name="flexalign",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flexalign {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Choose [bold]how much[/bold] of an alignment you want, as a number λ."""


def main() -> None:
    """Run the command line; a known error becomes one sentence and an exit code."""
    try:
        app(prog_name="flexalign")
    except FlexAlignError as error:
        console.print(f"[red]error:[/red] {error}", markup=True, soft_wrap=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)
