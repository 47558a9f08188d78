"""``flexalign sample``: make traces from prompts, with a model or a server."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flexalign.cli.console import console, print_json, progress_bar, read_secret, resumable
from flexalign.cli.options import Dtype, MaxNewTokens, SkipBadRows, Temperature, TopP
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from flexalign.data.rendering import Prompt
    from flexalign.data.traces import SamplingSettings

_PREVIEWED = 2


def sample(
    prompts: Annotated[
        Path,
        typer.Option(
            help="JSONL, JSON, Parquet or a saved data set, with problem, question, instruction, "
            "messages or prompt (text in prompt skips the chat template)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL file to write, or to go on with.")
    ],
    model: Annotated[
        str | None, typer.Argument(help="A model folder or a known name; none with --endpoint.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="A server of OpenAI's protocol, such as http://localhost:8000/v1."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The model's name at --endpoint.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the endpoint's key.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests under way at the endpoint at one time.")
    ] = 8,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers to each prompt.")] = 1,
    max_new_tokens: MaxNewTokens = 2048,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    batch_size: Annotated[int, typer.Option(help="Answers made, and saved, together.")] = 16,
    seed: Annotated[int, typer.Option(help="The same seed gives the same traces.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first prompts, this many.")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Write rendered text instead of messages; training does not need it.",
        ),
    ] = False,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="KEY=VALUE",
            help="An argument of the chat template, such as enable_thinking=false; repeatable.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system message of prompts that have none.")
    ] = None,
    dtype: Dtype = "auto",
    skip_bad_rows: SkipBadRows = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all and show two prompts; write nothing."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Make the traces that TrRa trains on: responses to prompts, as JSON Lines.

    A run that broke off goes on where it stopped when the same command is given again.

    Example: [cyan]flexalign sample smollm2 --prompts questions.jsonl -o traces.jsonl[/cyan]

    Example: [cyan]flexalign sample --endpoint http://localhost:8000/v1 --model-name R1
    --prompts math.json -n 4 -o traces.jsonl[/cyan]
    """
    from flexalign.cli._generators import LocalModel, Server
    from flexalign.data.formats import load_prompts
    from flexalign.data.prompting import PromptSettings, parse_template
    from flexalign.data.traces import SamplingSettings, make_traces, open_run

    settings = SamplingSettings(
        samples, max_new_tokens, temperature, top_p, batch_size, seed, plain
    )
    prompting = PromptSettings(parse_template(template or []), system)
    generator: LocalModel | Server
    if endpoint is None:
        _refuse({"--model-name": model_name, "--api-key-env": api_key_env}, "without --endpoint")
        generator = LocalModel(model, dtype, settings, prompting)
    else:
        _refuse(
            {"MODEL": model, "--plain": plain or None, "--template": template or None},
            "with --endpoint",
        )
        generator = Server(endpoint, model_name, read_secret(api_key_env), concurrency, settings)
    dataset = prompting.apply(load_prompts(prompts, skip_bad_rows=skip_bad_rows))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    total = len(dataset) * samples

    if dry_run:
        _preview(dataset, generator.render, settings, as_json)
        return
    done = open_run(dataset, output, settings, generator.source, generator.rendering)
    if done:
        console.print(f"{escape(str(output))} holds {done} of {total} rows; going on.")
    with resumable(), progress_bar("traces", total, done) as progress:
        summary = make_traces(
            dataset,
            output,
            generator.generate,
            settings,
            done=done,
            progress=progress,
            render=generator.render,
            rendering=generator.rendering,
        )
    if as_json:
        print_json({"output": str(output), **summary.to_json()})
        return
    tokens = "unknown" if summary.mean_tokens is None else f"{summary.mean_tokens:.1f}"
    console.print(
        f"{escape(str(output))}: {summary.rows} traces of {summary.prompts} prompts, "
        f"{summary.made} made now; mean tokens {tokens}, cut off {summary.truncated}."
    )
    console.print(
        f"next: a recipe with [cyan]data: {escape(str(output))}[/cyan], for flexalign realign or "
        "adapt; their --help shows one.",
        soft_wrap=True,
    )
    if summary.empty:
        console.print(f"{summary.empty} responses are empty; train with --skip-bad-rows.")


def _refuse(options: Mapping[str, object | None], where: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} has no meaning {where}; leave one of the two out.")


def _preview(
    dataset: "Dataset",
    render: "Callable[[Prompt], str]",
    settings: "SamplingSettings",
    as_json: bool,
) -> None:
    shown = [render(prompt) for prompt in dataset[:_PREVIEWED]["prompt"]]
    rows = len(dataset) * settings.samples
    if as_json:
        print_json({"prompts": len(dataset), "rows": rows, "preview": shown})
        return
    for number, text in enumerate(shown, start=1):
        console.rule(f"prompt {number}")
        console.print(text, markup=False, soft_wrap=True)
    console.rule()
    console.print(
        f"would make {rows} traces of {len(dataset)} prompts, "
        f"at most {rows * settings.max_new_tokens} tokens."
    )
