"""The local server: a model is opened and served, at an address, until the process is told to stop.

:func:`load_service` opens what the options name and starts its engine; :func:`run_server` serves an
application over it.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import uvicorn

from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import stop_ids
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, ServingError
from flexalign.fusion import gated_lambda
from flexalign.generation import TwoModelDecoder
from flexalign.lambdas import Fixed
from flexalign.serving.dial import DialRules, adapter_rules
from flexalign.serving.engine import (
    Engine,
    EngineLimits,
    InRaRunner,
    PairRunner,
    PlainRunner,
    Runner,
)
from flexalign.serving.middleware import is_loopback
from flexalign.serving.service import ServedModel, Service
from flexalign.systems import LocalBackend, System, SystemOptions


@dataclass(frozen=True)
class ServeOptions:
    """What to serve.

    Attributes:
        model: A folder or a known name; of a pair, the reference.
        adapter: An InRa adapter on it.
        aligned: Instead: the pair's other model.
        name: What requests call it; the model's own name if not given.
        lambda_range: λ to permit; the adapter's own range, [0, 1] for a pair, if not given.
        gate: As in :func:`flexalign.fusion.fuse`, for every request.
        any_base: Take an adapter that was made for another base.
        dtype: Of the weights.
        context: Tokens that a prompt and its answer may have together; the model's own if less.
        limits: How much the engine takes on.
        template: Arguments of the chat template, for every request.

    Raises:
        ConfigError: If options exclude each other, or a number is out of its range.
    """

    model: str
    adapter: str | None = None
    aligned: str | None = None
    name: str | None = None
    lambda_range: tuple[float, float] | None = None
    gate: float | None = None
    any_base: bool = False
    dtype: str = "auto"
    context: int | None = None
    limits: EngineLimits = field(default_factory=EngineLimits)
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what needs no weights."""
        if self.adapter and self.aligned:
            raise ConfigError("give --adapter or --aligned, not both: each is a dial of its own.")
        if self.any_base and not self.adapter:
            raise ConfigError("--any-base is about an adapter; name --adapter.")
        is_dial = self.adapter or self.aligned
        if not is_dial and (self.lambda_range is not None or self.gate is not None):
            raise ConfigError(
                "--lambda-range and --gate are about a dial, and the model alone has none; name "
                "its --adapter, or the --aligned model beside it."
            )
        if self.context is not None and self.context < 2:
            raise ConfigError(f"--context must be at least 2 tokens, got {self.context}.")
        if self.gate is not None:  # fuse's own check, at one token
            gated_lambda(torch.zeros(1), torch.zeros(1), 2.0, self.gate)


def load_service(options: ServeOptions) -> tuple[Service, DialRules]:
    """Load a model and start its engine.

    Raises:
        ConfigError: If a part is not there.
        CheckpointError: If a part is damaged.
        PairMismatchError: If parts do not fit together.
        UnsupportedModelError: If the engine cannot run the model.
    """
    runner, tokenizer, tags, rules = _open(options)
    model = runner.model
    tags = tags or ThinkingTags.of(tokenizer)

    configs = [side.config for side in _sides(model)]
    known = [getattr(config, "max_position_embeddings", None) for config in configs]
    limits = [limit for limit in (*known, options.context) if limit is not None]
    served = ServedModel(
        options.name or options.model,
        tokenizer,
        tags,
        min(limits, default=4096),
        min(config.vocab_size for config in configs),
    )

    ends = _ends(model.generation_config.eos_token_id, tokenizer)
    engine = Engine(runner, tokenizer, tags, ends, options.limits)
    engine.start()
    return Service(served, engine, options.limits.queue), rules


def _open(options: ServeOptions) -> tuple[Runner, Any, ThinkingTags | None, DialRules]:
    """Open the model, the pair or the dial; return its runner, tokenizer, tags if known, and rules."""
    backend = LocalBackend(
        System.of(options.model, options.adapter, options.aligned),
        options=SystemOptions(
            gate=options.gate,
            dtype=options.dtype,
            lambda_range=options.lambda_range,
            any_base=options.any_base,
            template=options.template,
        ),
    )
    tokenizer, settings = backend.text.tokenizer, backend.config
    if backend.kind == "model":
        return PlainRunner(backend.load()), tokenizer, None, DialRules(None)
    if settings is None:
        decoder = backend.load()
        PromptSettings(options.template).bind(decoder.tokenizer)
        rules = DialRules(Fixed(1.0), options.lambda_range or (0.0, 1.0))
        return PairRunner(decoder, options.gate), decoder.tokenizer, None, rules

    rules = adapter_rules(settings, options.lambda_range)
    model = backend.load()
    # The model warns of λ outside its range: the operator has decided here.
    model.inra_config = replace(settings, lambda_range=rules.lambda_range)
    return InRaRunner(model, options.gate), tokenizer, settings.tags, rules


def _sides(model: Any) -> Sequence[Any]:
    return [model.reference, model.aligned] if isinstance(model, TwoModelDecoder) else [model]


def _ends(given: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's and its tokenizer's."""
    own = given if isinstance(given, list | tuple) else [given]
    return [int(end) for end in dict.fromkeys([*own, *stop_ids(tokenizer)]) if end is not None]


def require_safe_address(host: str, key: str | None, *, insecure: bool) -> None:
    """Refuse to let the network in without a key.

    Raises:
        ConfigError: If the address is not this machine's own, there is no key, and nobody said
            that this is meant.
    """
    if not is_loopback(host) and key is None and not insecure:
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no key; name the environment "
            "variable that holds one with --api-key-env, or say --insecure."
        )


def open_socket(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 takes a free one.

    Raises:
        ServingError: If the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ServingError(
            f"{host}, port {port}: {reason}; choose another --host or --port (--port 0 takes a free one)."
        ) from error


def url_of(host: str, port: int, *, scheme: str = "http") -> str:
    """Return where a server's API is."""
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}/v1"


def run_server(
    app: Any, listening: socket.socket, *, grace: float, is_well: Callable[[], bool]
) -> None:
    """Serve until SIGTERM or Ctrl-C; then take nothing new and let what runs finish.

    Args:
        app: The ASGI application.
        listening: Of :func:`open_socket`.
        grace: Seconds that running answers have.
        is_well: Whether the engine runs. Once it does not, the server ends as well, so that
            whatever looks after the process starts it again.

    Raises:
        ServingError: If the engine has failed.
    """
    logging.getLogger("flexalign").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    # uvicorn raises the signal once more when it is done; a clean end is no failure.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _UvicornServer(config, is_well).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
    if not is_well():
        raise ServingError("the engine has failed; the log above says why. Start the server again.")


class _UvicornServer(uvicorn.Server):
    """Ends by itself when the engine has."""

    def __init__(self, config: uvicorn.Config, is_well: Callable[[], bool]) -> None:
        super().__init__(config)
        self._is_well = is_well

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether the server ends."""
        return not self._is_well() or await super().on_tick(counter)
