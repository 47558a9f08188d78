"""``flexalign serve``: a server of OpenAI's protocol with a dial on every request."""

from pathlib import Path
from typing import Annotated

import typer

from flexalign._packages import require_packages
from flexalign.cli._address import tell_address, url_of
from flexalign.cli._vllm import Parts, serve_on_vllm
from flexalign.cli.console import as_input_errors
from flexalign.cli.options import (
    Adapter,
    Aligned,
    AnyBase,
    Dtype,
    EngineName,
    Gate,
    read_range,
    read_secret,
)
from flexalign.errors import ConfigError

_NEEDED = ("fastapi", "starlette", "uvicorn", "prometheus_client")
_ROWS, _QUEUE = 32, 256


def serve(
    model: Annotated[
        str, typer.Argument(help="A model folder or a known name; of a pair, the reference.")
    ],
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="vLLM's own flags, passed on to it."),
    ] = None,
    adapter: Adapter = None,
    aligned: Aligned = None,
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
    grace: Annotated[
        float, typer.Option(min=1, help="Seconds for running answers after SIGTERM.")
    ] = 30.0,
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
    limits = read_range(lambda_range)
    key = read_secret(api_key_env)
    is_local = key is None and not insecure
    body_bytes = round(body_limit * 2**20)
    if engine is EngineName.VLLM:
        from flexalign.serving.server import require_safe_address
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
            "front": FrontOptions(limits, body_bytes, playground, is_local),
            "flags": tuple(flags or ()),
        }
        parts = Parts(model, adapter, aligned, gate, any_base, prepared)
        serve_on_vllm(parts, settings, dry_run=dry_run, as_json=as_json)
        return
    if flags or prepared is not None or dry_run:
        raise ConfigError("flags after --, --prepared and --dry-run are about --engine vllm.")
    from flexalign.cli.console import quieten_libraries, warnings_as_notes
    from flexalign.serving.app import create_app
    from flexalign.serving.engine import EngineLimits
    from flexalign.serving.playground import Playground
    from flexalign.serving.server import (
        ServeOptions,
        load_service,
        open_socket,
        require_safe_address,
        run_server,
    )

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
    )
    quieten_libraries()
    with open_socket(host, port) as listening:
        with warnings_as_notes(), as_input_errors():
            service, rules = load_service(options)
        app = create_app(service, rules, key=key, is_local=is_local, body_limit=body_bytes)
        if playground:
            app = Playground(app)
        tell_address(
            url_of(host, listening.getsockname()[1]),
            service.model.name,
            rules.lambda_range,
            playground=playground,
            as_json=as_json,
        )
        try:
            running = service.engine
            run_server(app, listening, grace=grace, is_well=lambda: running.is_alive)
        finally:
            service.engine.stop()
