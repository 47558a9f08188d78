"""``flexalign serve --engine vllm``: what is refused before anything starts, and what is printed."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from flexalign.cli._address import tell_address, url_of
from flexalign.cli.console import as_input_errors, console, print_json
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.serving.vllm.launch import Launch


@dataclass(frozen=True)
class Parts:
    """What is to be served.

    Attributes:
        model: The base, or a folder that was prepared.
        adapter: The adapter on it.
        aligned: The other model of a pair, which vLLM does not serve.
        gate: A gate, which it does not serve either.
        any_base: Take another base than the adapter was made for.
        prepared: Where to prepare the folder that vLLM loads; a cache if None.
    """

    model: str
    adapter: str | None
    aligned: str | None
    gate: float | None
    any_base: bool
    prepared: Path | None


def serve_on_vllm(parts: Parts, settings: dict[str, Any], *, dry_run: bool, as_json: bool) -> None:
    """Prepare the folder and run vLLM's server.

    Args:
        parts: What is served.
        settings: What :class:`~flexalign.serving.vllm.launch.Launch` takes beside the folder.
        dry_run: Print what would be run instead.
        as_json: Print JSON.

    Raises:
        ConfigError: If vLLM is not there, or something cannot be served on it.
        ServingError: If vLLM ends by itself.
    """
    if parts.aligned is not None:
        raise ConfigError("--aligned is served by --engine local alone; on vLLM give --adapter.")
    if parts.gate is not None:
        raise ConfigError("--gate is served by --engine local alone; leave it out on vLLM.")
    from flexalign.inra.configuration import InRaConfig
    from flexalign.models.sources import resolve_adapter
    from flexalign.serving.dial import adapter_rules
    from flexalign.serving.server import open_socket
    from flexalign.serving.vllm.launch import Launch, check_flags, require_vllm, run

    check_flags(settings["flags"])
    if not dry_run:
        require_vllm()
    with as_input_errors():
        launch = Launch(_folder(parts), **settings)
        dial = resolve_adapter(parts.adapter) if parts.adapter else launch.folder
        rules = adapter_rules(InRaConfig.load(dial), launch.front.lambda_range)
    if dry_run:
        _show(launch, as_json)
        return
    with open_socket(launch.host, launch.port) as free:
        launch = replace(launch, port=free.getsockname()[1])
    with as_input_errors():
        _prepare(parts, launch.folder)

    def tell() -> None:
        tell_address(
            _url(launch),
            launch.name,
            rules.lambda_range,
            engine="on vLLM",
            playground=launch.front.playground,
            as_json=as_json,
        )

    run(launch, tell)


def _folder(parts: Parts) -> Path:
    """Return the folder that vLLM will load.

    Raises:
        ConfigError: If there is no adapter, neither beside the model nor in a prepared folder.
    """
    from flexalign.serving.vllm.folder import is_prepared
    from flexalign.serving.vllm.launch import cached_folder

    if parts.adapter is not None:
        cached = cached_folder(parts.model, parts.adapter, any_base=parts.any_base)
        return (parts.prepared or cached).expanduser().absolute()
    folder = Path(parts.model).expanduser().absolute()
    if not is_prepared(folder):
        raise ConfigError(
            "--engine vllm is about a dial; name the model's --adapter, or a folder that was "
            "prepared. A model without one is served by vLLM alone."
        )
    return folder


def _prepare(parts: Parts, folder: Path) -> None:
    from flexalign.serving.vllm.folder import prepare_folder
    from flexalign.serving.vllm.launch import prepare_once

    if parts.adapter is None:
        return
    console.print(f"preparing {escape(str(folder))} for vLLM, which takes a while to start")
    if parts.prepared is not None:
        prepare_folder(parts.model, parts.adapter, folder, any_base=parts.any_base)
    else:
        prepare_once(parts.model, parts.adapter, folder, any_base=parts.any_base)


def _show(launch: "Launch", as_json: bool) -> None:
    """Print the folder, the variables and the command; a key is not shown."""
    variables = {name: value for name, value in launch.variables().items() if name.startswith("F")}
    command = launch.command()
    if as_json:
        shown = {"folder": str(launch.folder), "environment": variables, "command": command}
        print_json(shown)
        return
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    console.print(f"prepared in {escape(str(launch.folder))}; the key, if any, is in VLLM_API_KEY.")
    print(" ".join([*words, shlex.join(command)]))


def _url(launch: "Launch") -> str:
    is_safe = any(flag.startswith("--ssl-certfile") for flag in launch.flags)
    return url_of(launch.host, launch.port, scheme="https" if is_safe else "http")
