"""``flexalign export``: write what flexalign trained in the formats of other tools.

One subcommand for each format. ``lora`` is the format where none is named.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from flexalign.cli.console import (
    as_input_errors,
    console,
    print_json,
    progress_bar,
    say,
    without_downloads,
)
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
    """Write a LoRA dial at chosen strengths, or a model as GGUF, for tools that know no λ.

    FORMAT FOLDER, or only FOLDER: the format is then [bold]lora[/bold]. A folder that has the name
    of a format is ./NAME.

    Example: [cyan]flexalign export out/dial --lambda 0.5,1,2 --output out/adapters[/cyan]

    A model: [cyan]flexalign export gguf out/student student.gguf[/cyan]
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


@export.command()
def gguf(
    model: Annotated[
        str, typer.Argument(help="A student's or baked model's folder, hub id or known name.")
    ],
    output: Annotated[Path, typer.Argument(help="The file to write, NAME.gguf; it must be new.")],
    outtype: Annotated[
        str,
        typer.Option(
            "--outtype",
            help="Type of the weight matrices: auto (as they are stored), f32, f16 or bf16.",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and write nothing.")
    ] = False,
    as_json: ResultAsJson = False,
) -> None:
    """Write a model as one GGUF file, for llama.cpp, Ollama and LM Studio.

    Tokenizer, chat template, thinking tags and end tokens are in it. Beside it stands
    NAME.Modelfile, for Ollama. A dial is baked at one λ first (flexalign bake).

    Example: [cyan]flexalign export gguf out/student student.gguf[/cyan]

    Then: [cyan]llama-server -m student.gguf[/cyan] or [cyan]ollama create student -f
    student.Modelfile[/cyan]
    """
    from flexalign.models.gguf_file import GGUFExport
    from flexalign.models.hub import as_size

    with as_input_errors(), without_downloads(dry_run=dry_run):
        planned = GGUFExport.of(model, output, outtype=outtype)

    if not dry_run:
        with progress_bar("tensors", len(planned.tensors)) as show:
            planned.write(show)
    if as_json:
        print_json(planned.to_json() | {"dry_run": dry_run})
        return
    if dry_run:
        say(f"a dry run: nothing is written; it would be {as_size(planned.size)}.")
    tags = planned.thinking
    between = "" if tags is None else f"; thinking between {tags.open} and {tags.close}"
    say(f"a response ends at {' or '.join(planned.stops)}{between}.")
    for path in (planned.output, planned.modelfile):
        console.print(escape(str(path)), soft_wrap=True)
