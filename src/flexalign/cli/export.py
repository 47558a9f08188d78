"""``flexalign export``: write what flexalign trained in the formats of other tools.

One subcommand for each format. ``lora`` is the format where none is named.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from flexalign.cli.console import as_input_errors, console, print_json, say, without_downloads
from flexalign.cli.options import PermittedRange, Private, PushTo, ResultAsJson, read_range
from flexalign.cli.training import command_line, planned_push
from flexalign.lambdas import parse_lambdas

_DEFAULT = "lora"


class ExportGroup(TyperGroup):
    """The formats; what is no format's name is an argument of the default one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default format before arguments that name none."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_DEFAULT, *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


export = typer.Typer(
    name="export",
    cls=ExportGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@export.callback()
def _root() -> None:
    """Write a LoRA dial at chosen strengths, for tools that know no λ.

    FORMAT FOLDER, or only FOLDER: the format is then [bold]lora[/bold]. A folder that has the name
    of a format is ./NAME.

    Example: [cyan]flexalign export out/dial --lambda 0.5,1,2 --output out/adapters[/cyan]
    """


@export.command()
def lora(
    folder: Annotated[str, typer.Argument(help="A LoRA dial's folder, hub id or known name.")],
    lam: Annotated[str, typer.Option("--lambda", help="The strengths, such as 0.5,1,2.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; it must be new or empty.")
    ],
    lambda_range: PermittedRange = None,
    push: PushTo = None,
    private: Private = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and write nothing.")
    ] = False,
    as_json: ResultAsJson = False,
) -> None:
    """Write plain PEFT adapters, one for each λ, in OUTPUT/lambda=0.5/ and so on.

    Any engine that serves LoRA serves them by name, without flexalign.

    Example: [cyan]flexalign export lora out/dial --lambda 0.5,1,2 --output out/adapters[/cyan]

    Then: [cyan]vllm serve BASE --enable-lora --max-lora-rank 32 --lora-modules
    half=out/adapters/lambda=0.5 double=out/adapters/lambda=2[/cyan]
    """
    limits = read_range(lambda_range)
    lams = [dial.lam for dial in parse_lambdas(lam)]
    target = planned_push(push, private=private)
    from flexalign.lora_dial.export import export_lora

    with as_input_errors(), without_downloads(dry_run=dry_run):
        if target is not None and not dry_run:
            export_lora(folder, lams, output, lambda_range=limits, dry_run=True)
            target.create()
        found = export_lora(folder, lams, output, lambda_range=limits, dry_run=dry_run)

    if target is not None and not dry_run:
        from flexalign._storage import write_text
        from flexalign.training.card import export_card

        card = export_card(folder, [path.name for path in found.adapters.values()], command_line())
        write_text(output / "README.md", card)
        say(f"uploaded: {target.upload(output)}")
    if as_json:
        print_json(found.to_json() | {"dry_run": dry_run})
        return
    if dry_run:
        if target is not None:
            say(f"would upload {output} to {target.repo}.")
        say(f"a dry run: nothing is written; it would be {found.size / 2**20:.1f} MiB.")
    for path in found.adapters.values():
        console.print(escape(str(path)), soft_wrap=True)
