"""The ``flexalign`` command: its subcommands, and the exit codes of errors."""

import atexit
import errno
import gc
import sys
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from flexalign._version import __version__
from flexalign.cli.adapt import adapt
from flexalign.cli.bake import bake
from flexalign.cli.cache import cache
from flexalign.cli.calibrate import calibrate
from flexalign.cli.chat import chat
from flexalign.cli.compare import compare
from flexalign.cli.console import console, hide_library_warnings, show_in_any_encoding
from flexalign.cli.demo import demo
from flexalign.cli.evaluate import evaluate
from flexalign.cli.export import export
from flexalign.cli.generate import generate
from flexalign.cli.inspect import inspect
from flexalign.cli.miniature import miniature
from flexalign.cli.realign import realign
from flexalign.cli.sample import sample
from flexalign.cli.serve import serve
from flexalign.cli.training import AdaptCommand, BakeCommand, RealignCommand
from flexalign.cli.tune import tune
from flexalign.errors import FlexAlignError

app = typer.Typer(
    name="flexalign",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
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
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Choose [bold]how much[/bold] of an alignment you want, as a number λ.

    λ = 0 is the reference model, λ = 1 the aligned one; between them is a mixture, and beyond 1
    the alignment goes further than it was trained.

    Start with: [cyan]flexalign demo[/cyan]
    """


app.command(cls=AdaptCommand)(adapt)
app.command(cls=BakeCommand)(bake)
app.command()(cache)
app.command()(calibrate)
app.command()(chat)
app.command()(demo)
app.command()(evaluate)
app.command()(compare)
app.command()(generate)
app.command()(inspect)
app.command(cls=RealignCommand)(realign)
app.command()(sample)
app.command()(serve)
app.command()(tune)
app.add_typer(export)
app.add_typer(miniature)


def main() -> None:
    """Run the command line; an expected error becomes one sentence and an exit code.

    Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted.
    """
    show_in_any_encoding()
    hide_library_warnings()
    # At its end the interpreter collects garbage among all objects of torch and transformers, which
    # takes more than a second of a core. Frozen objects are not searched; the process frees them.
    atexit.register(gc.freeze)
    try:
        app(prog_name="flexalign")
    except FlexAlignError as error:
        _fail(str(error), 2 if isinstance(error, ValueError) else 1)
    except OSError as error:
        _fail(_explain(error), 1)


def _fail(message: str, code: int) -> NoReturn:
    console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    sys.exit(code)


def _explain(error: OSError) -> str:
    where = f" {error.filename}" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk is full, writing{where or ' output'}; free space and run it again."
        case errno.EROFS:
            return f"{where.strip() or 'the output'} is on a read-only disk; name another --output."
        case errno.EACCES | errno.EPERM:
            return f"no permission for{where or ' a file'}; change its rights or name another path."
        case _:
            return str(error)
