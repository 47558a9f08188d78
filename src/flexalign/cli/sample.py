"""``flexalign sample``: make traces from prompts, with a model or a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flexalign.cli.console import (
    console,
    note,
    print_json,
    progress_bar,
    resumable,
    without_downloads,
)
from flexalign.cli.options import (
    UNCHANGED_LOGITS,
    Adapter,
    Aligned,
    AlignedPrompt,
    AnyBase,
    Attempts,
    ByID,
    Columns,
    Concurrency,
    Dtype,
    MaxNewTokens,
    PermittedRange,
    ReferencePrompt,
    ServerKey,
    ServerModel,
    SkipBadRows,
    Temperature,
    Template,
    Timeout,
    TopP,
    read_lambdas,
    read_prompt_pair,
    read_range,
    read_secret,
    refuse_options,
    with_logits_options,
)
from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.systems.sampling import SampleRun

_PREVIEWED = 2
_SERVER = "url:"
"""In front of a server's address in place of a model, as in ``flexalign evaluate``."""

_OF_SERVERS = ("model_name", "api_key_env", "concurrency", "timeout", "attempts")
"""Parameters that only a server reads."""

_OF_MODELS = (
    *("plain", "template", "adapter", "aligned", "by_id", "reference_prompt", "aligned_prompt"),
    *("lambda_range", "any_base", "dtype"),
)
"""Parameters that only a model on this machine reads."""


@with_logits_options
def sample(
    context: typer.Context,
    prompts: Annotated[
        Path,
        typer.Option(
            help="JSONL, JSON, CSV (also .gz), Parquet, a folder of shards or a saved data set, with "
            "problem, question, instruction, messages or prompt (text in prompt skips the chat "
            "template)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL file to write, or to go on with.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model's folder, hub id or known name, or url:http://…; none with --endpoint."
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="A server of OpenAI's protocol, such as http://localhost:8000/v1."),
    ] = None,
    model_name: ServerModel = None,
    api_key_env: ServerKey = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 600.0,
    attempts: Attempts = 5,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers to each prompt.")] = 1,
    max_new_tokens: MaxNewTokens = 2048,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    logits: LogitsSettings = UNCHANGED_LOGITS,
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
    adapter: Adapter = None,
    aligned: Aligned = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            help="Of --adapter, --aligned or two prompts: 0 is the reference, 1 the other.",
        ),
    ] = None,
    lambda_range: PermittedRange = None,
    any_base: AnyBase = False,
    by_id: ByID = False,
    template: Template = None,
    system_message: Annotated[
        str | None, typer.Option("--system", help="The system message of prompts that have none.")
    ] = None,
    dtype: Dtype = "auto",
    columns: Columns = None,
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

    Example: [cyan]flexalign sample smollm2 --aligned-prompt system='Answer in one short sentence.'
    --lambda 1.5 --prompts questions.jsonl -o brief.jsonl[/cyan]
    """
    from flexalign.data.columns import parse_columns
    from flexalign.data.prompting import PromptSettings, parse_template
    from flexalign.data.traces import SamplingSettings
    from flexalign.systems import System, SystemOptions
    from flexalign.systems.sampling import SampleRun

    settings = SamplingSettings(
        samples, max_new_tokens, temperature, top_p, batch_size, seed, plain, logits
    )

    two_prompts, dials = read_prompt_pair(reference_prompt, aligned_prompt), read_lambdas(lam)
    has_dial = any(side is not None for side in (two_prompts, adapter, aligned))
    if len(dials) > 1 or (dials and not has_dial):
        raise ConfigError(
            "--lambda is one λ between two sides; give --aligned-prompt, --adapter or --aligned "
            "with it."
        )

    if endpoint is None and model is not None and model.startswith(_SERVER):
        endpoint, model = model.removeprefix(_SERVER), None
    if endpoint is None:
        refuse_options(context, "without --endpoint", of=_OF_SERVERS)
        if model is None:
            raise ConfigError("name a MODEL, or a server with --endpoint.")
        if not has_dial:
            where = "without --adapter, --aligned or --aligned-prompt"
            refuse_options(context, where, of=("lambda_range",))
        system = System.of(model, adapter, aligned, two_prompts)
    else:
        given = ("model",) if model is not None else ()  # not a server's url: in its place
        refuse_options(context, "with --endpoint", of=(*given, *_OF_MODELS))
        system = System("endpoint", "url", (endpoint,))

    options = SystemOptions(
        dtype=dtype,
        model_name=model_name,
        api_key=read_secret(api_key_env),
        concurrency=concurrency,
        timeout_seconds=timeout,
        attempts=attempts,
        on_retry=note,
        prompts=two_prompts,
        lambda_range=read_range(lambda_range),
        any_base=any_base,
        by_id=by_id,
    )

    with without_downloads(dry_run=dry_run):
        run = SampleRun(
            system,
            prompts,
            output,
            settings,
            options=options,
            prompting=PromptSettings(parse_template(template or []), system_message),
            lam=dials[0] if dials else None,
            limit=limit,
            skip_bad_rows=skip_bad_rows,
            columns=parse_columns(columns, "--columns"),
        )
        if dry_run:
            _preview(run, as_json)
            return

    done = run.begin()
    if done:
        console.print(f"{escape(str(output))} holds {done} of {run.total} rows; going on.")
    with resumable(), progress_bar("traces", run.total, done) as progress:
        summary = run.finish(progress)

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


def _preview(run: "SampleRun", as_json: bool) -> None:
    """Print the first prompts and the number of traces."""
    shown = run.preview(_PREVIEWED)
    if as_json:
        print_json({"prompts": len(run.prompts), "rows": run.total, "preview": shown})
        return

    for number, text in enumerate(shown, start=1):
        console.rule(f"prompt {number}")
        console.print(text, markup=False, soft_wrap=True)
    console.rule()
    console.print(
        f"would make {run.total} traces of {len(run.prompts)} prompts, "
        f"at most {run.total * run.settings.max_new_tokens} tokens."
    )
