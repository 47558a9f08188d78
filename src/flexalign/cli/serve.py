"""``flexalign serve``: a server of OpenAI's protocol with a dial on every request."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from flexalign._packages import require_packages
from flexalign.cli.console import (
    as_input_errors,
    console,
    print_json,
    quieten_libraries,
    say,
    warnings_as_notes,
    without_downloads,
)
from flexalign.cli.options import (
    Adapter,
    Aligned,
    AlignedPrompt,
    AnyBase,
    ByID,
    Calibrated,
    Dtype,
    EngineName,
    Gate,
    ReferencePrompt,
    Template,
    read_prompt_pair,
    read_range,
    read_secret,
)
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.models.prompted import PromptPair
    from flexalign.serving.server import ServeOptions
    from flexalign.serving.vllm.launch import DialSource, Launch

_NEEDED = ("fastapi", "starlette", "uvicorn", "prometheus_client")
_ROWS, _QUEUE = 32, 256


class UnknownKeys(StrEnum):
    """What becomes of keys of a request that the server does not know."""

    REFUSE = "refuse"
    WARN = "warn"


def serve(
    model: Annotated[
        str,
        typer.Argument(help="A model's folder, hub id or known name; of a pair, the reference."),
    ],
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="vLLM's own flags, passed on to it."),
    ] = None,
    adapter: Adapter = None,
    aligned: Aligned = None,
    reference_prompt: ReferencePrompt = None,
    aligned_prompt: AlignedPrompt = None,
    calibration: Calibrated = None,
    engine: Annotated[
        EngineName, typer.Option(help="local runs here; vllm starts vLLM (docs/vllm.md).")
    ] = EngineName.LOCAL,
    host: Annotated[
        str, typer.Option(help="Address; other machines come in by 0.0.0.0, which wants a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What requests call the model; MODEL if not given.")
    ] = None,
    lambda_range: Annotated[
        str | None,
        typer.Option(
            help="λ that requests may ask for, such as -1,2; the adapter's own range, a pair's "
            "0,1 otherwise."
        ),
    ] = None,
    gate: Gate = None,
    any_base: AnyBase = False,
    by_id: ByID = False,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the key that requests must carry."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Let other machines, and pages of any site, in without a key."
        ),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"Answers written at a time; {_ROWS}, or vLLM's own number."),
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Answers that may wait, {_QUEUE}; more get status 429. On vLLM no limit, and 503.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of a prompt and its answer; the model's own if less."),
    ] = None,
    body_limit: Annotated[
        float, typer.Option(min=0.001, help="Longest body of a request in MiB.")
    ] = 4.0,
    unknown_keys: Annotated[
        UnknownKeys,
        typer.Option(help="Keys of a request that nothing reads: a 400, or named in a header."),
    ] = UnknownKeys.REFUSE,
    grace: Annotated[
        float, typer.Option(min=1, help="Seconds for running answers after SIGTERM.")
    ] = 30.0,
    template: Template = None,
    dtype: Dtype = "auto",
    playground: Annotated[
        bool, typer.Option("--playground", help="A page to try the dial from, at /playground.")
    ] = False,
    prepared: Annotated[
        Path | None,
        typer.Option(help="Where to prepare the folder that vLLM loads, instead of in a cache."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command that would start vLLM.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where the server is as JSON, alone, on stdout.")
    ] = False,
) -> None:
    """Serve a model over OpenAI's API, every request with its own λ.

    Requests say lambda (a number, a schedule, a policy or "auto"), effort or reasoning_effort. The
    address goes to stdout as soon as requests are taken.

    Example: [cyan]flexalign serve miniature --adapter miniature:fast --playground[/cyan]

    Example: [cyan]flexalign serve models/base --aligned models/concise --lambda-range 0,2
    --gate 0.01[/cyan]

    Example: [cyan]flexalign serve models/R1 --adapter out/fast --engine vllm --
    --tensor-parallel-size 2[/cyan]

    Example: [cyan]KEY=… flexalign serve models/R1 --adapter out/fast --host 0.0.0.0
    --api-key-env KEY[/cyan]
    """
    extras = "vllm,serving" if engine is EngineName.VLLM else "serving"
    require_packages("serving", *_NEEDED, install=f"'flexalign[{extras}]'")
    limits, two_prompts = (
        read_range(lambda_range),
        read_prompt_pair(reference_prompt, aligned_prompt),
    )
    key = read_secret(api_key_env)
    is_local = key is None and not insecure
    body_bytes = round(body_limit * 2**20)
    warns_unknown = unknown_keys is UnknownKeys.WARN

    from flexalign.data.prompting import parse_template
    from flexalign.serving.server import require_safe_address

    if engine is EngineName.VLLM:
        _refuse_on_vllm(two_prompts, calibration, aligned, gate, by_id=by_id)
        from flexalign.serving.vllm.launch import DialSource
        from flexalign.serving.vllm.middleware import FrontOptions

        require_safe_address(host, key, insecure=insecure)
        settings = {
            "name": model_name or model,
            "host": host,
            "port": port,
            "key": key,
            "grace": grace,
            "dtype": dtype,
            "context": context,
            "rows": batch_size,
            "queue": queue,
            "front": FrontOptions(limits, body_bytes, playground, is_local, warns_unknown),
            "flags": tuple(flags or ()),
            "template": parse_template(template or []),
        }
        source = DialSource(model, adapter, any_base, prepared)
        _serve_on_vllm(source, settings, dry_run=dry_run, as_json=as_json)
        return

    if flags or prepared is not None or dry_run:
        raise ConfigError("flags after --, --prepared and --dry-run are about --engine vllm.")
    from flexalign.serving.engine import EngineLimits
    from flexalign.serving.server import ServeOptions

    require_safe_address(host, key, insecure=insecure)
    options = ServeOptions(
        model,
        adapter,
        aligned,
        model_name,
        limits,
        gate,
        any_base,
        dtype,
        context,
        EngineLimits(batch_size or _ROWS, queue or _QUEUE),
        parse_template(template or []),
        two_prompts,
        by_id,
        calibration,
    )
    _serve_here(
        options,
        host,
        port,
        {
            "key": key,
            "is_local": is_local,
            "body_limit": body_bytes,
            "warns_unknown": warns_unknown,
        },
        grace=grace,
        playground=playground,
        as_json=as_json,
    )


def _refuse_on_vllm(
    prompts: "PromptPair | None",
    calibration: Path | None,
    aligned: str | None,
    gate: float | None,
    *,
    by_id: bool,
) -> None:
    """Refuse what only the local engine serves.

    Raises:
        ConfigError: If one of the options is given.
    """
    if prompts is not None:
        raise ConfigError(
            "--reference-prompt and --aligned-prompt are served by --engine local alone: vLLM "
            "runs one prompt for each request; leave --engine out."
        )
    if calibration is not None:
        raise ConfigError(
            "--calibration is that of two prompts, which vLLM does not serve; leave it out."
        )
    if aligned is not None:
        raise ConfigError("--aligned is served by --engine local alone; on vLLM give --adapter.")
    if by_id:
        raise ConfigError("--by-id is about --aligned, which vLLM does not serve; leave it out.")
    if gate is not None:
        raise ConfigError("--gate is served by --engine local alone; leave it out on vLLM.")


def _serve_here(
    options: "ServeOptions",
    host: str,
    port: int,
    access: dict[str, Any],
    *,
    grace: float,
    playground: bool,
    as_json: bool,
) -> None:
    """Load the model and serve it in this process until it is stopped.

    Args:
        options: What to serve.
        host: The address.
        port: Its port; 0 takes a free one.
        access: Key and limits, keyword arguments of :func:`flexalign.serving.app.create_app`.
        grace: Seconds for running answers after SIGTERM.
        playground: Serve the playground page too.
        as_json: Print the address as JSON.
    """
    from flexalign.serving.address import open_socket, url_of
    from flexalign.serving.app import create_app
    from flexalign.serving.playground import Playground
    from flexalign.serving.server import load_service, run_server

    quieten_libraries()
    # The socket comes first: an address in use is an error before minutes of loading.
    with open_socket(host, port) as listening:
        with warnings_as_notes(), as_input_errors():
            service, rules = load_service(options)
        if options.prompts is not None:
            say(
                "a request's own system message stays on both sides; the system messages of the "
                "two prompts follow it."
            )
        app = create_app(service, rules, **access)
        if playground:
            app = Playground(app)

        def announce() -> None:
            _print_address(
                url_of(host, listening.getsockname()[1]),
                service.model.name,
                rules.lambda_range,
                playground=playground,
                as_json=as_json,
            )

        engine = service.engine
        try:
            run_server(
                app, listening, grace=grace, is_well=lambda: engine.is_alive, on_ready=announce
            )
        finally:
            engine.stop()


def _print_address(
    url: str,
    model: str,
    lambda_range: tuple[float, float],
    *,
    engine: str = "",
    playground: bool,
    as_json: bool,
) -> None:
    """Print what is served on stderr, and only the address on stdout.

    Args:
        url: The URL of :func:`flexalign.serving.address.url_of`.
        model: The model's name in requests.
        lambda_range: The least and the largest λ of requests.
        engine: The engine, such as "on vLLM"; empty for this process.
        playground: Whether the playground page is served.
        as_json: Print the address as JSON.
    """
    say(f"serving {model}{engine and f' {engine}'}; stop it with Ctrl-C.")
    if playground:
        say(f"playground: {url.removesuffix('/v1')}/playground")
    if as_json:
        print_json({"url": url, "model": model, "lambda_range": list(lambda_range)})
    else:
        print(url, flush=True)


def _serve_on_vllm(
    source: "DialSource", settings: dict[str, Any], *, dry_run: bool, as_json: bool
) -> None:
    """Prepare the folder and run vLLM's server until it is stopped.

    Args:
        source: What to serve.
        settings: The arguments of :class:`~flexalign.serving.vllm.launch.Launch` without the folder.
        dry_run: Only print the command.
        as_json: Print JSON.
    """
    from flexalign.serving.vllm.launch import Launch, check_flags, require_vllm, run

    check_flags(settings["flags"], has_template=bool(settings["template"]))
    if not dry_run:
        require_vllm()
    with as_input_errors(), without_downloads(dry_run=dry_run):
        launch = Launch(source.folder(), **settings)
        rules = source.rules(launch.front.lambda_range)
        source.require_template(launch.template)
    if dry_run:
        _show_launch(launch, as_json)
        return

    launch = launch.on_free_port()
    if source.adapter is not None:
        shown = escape(str(launch.folder))
        console.print(f"preparing {shown} for vLLM, which takes a while to start")
    with as_input_errors():
        source.prepare()

    def announce() -> None:
        _print_address(
            launch.url,
            launch.name,
            rules.lambda_range,
            engine="on vLLM",
            playground=launch.front.playground,
            as_json=as_json,
        )

    run(launch, announce)


def _show_launch(launch: "Launch", as_json: bool) -> None:
    """Print the folder, the environment variables and the command, but not the key."""
    if as_json:
        print_json(
            {
                "folder": str(launch.folder),
                "environment": launch.public_variables(),
                "command": launch.command(),
            }
        )
        return
    console.print(f"prepared in {escape(str(launch.folder))}; the key, if any, is in VLLM_API_KEY.")
    print(launch.shell_line())
