"""The local server: opens a model and serves it at an address until the process is stopped.

:func:`load_service` opens the model of the options and starts its engine; :func:`run_server` runs an
ASGI application.
"""

import logging
import signal
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import torch
import uvicorn

from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import end_ids
from flexalign.data.template_arguments import template_variables
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, ServingError
from flexalign.fusion import gated_lambda
from flexalign.generation import TwoModelDecoder, TwoPromptDecoder
from flexalign.lambdas import Fixed
from flexalign.lora_dial import LoRADial
from flexalign.models.prompted import PromptPair
from flexalign.serving.dial import (
    EFFORT_ARGUMENTS,
    PROMPTS_NOT_CALIBRATED,
    DialRules,
    adapter_rules,
)
from flexalign.serving.engine import (
    Engine,
    EngineLimits,
    InRaRunner,
    LoRARunner,
    PairRunner,
    PlainRunner,
    Runner,
    TwoPromptRunner,
)
from flexalign.serving.middleware import is_loopback
from flexalign.serving.service import ServedModel, Service
from flexalign.systems import LocalBackend, System, SystemOptions
from flexalign.systems.open import require_two_models, require_two_prompts

_PAIR_EFFORT = "two models have no effort; choose a λ with flexalign tune pair:REFERENCE,ALIGNED, and give lambda."
"""Why a server of two models refuses an effort."""


@dataclass(frozen=True)
class ServeOptions:
    """What to serve.

    Attributes:
        model: A folder or a known name; of a pair, the reference.
        adapter: A dial on the model: an InRa adapter or a LoRA.
        aligned: Instead of an adapter, the aligned model of a pair.
        name: The model's name in requests; ``model`` if not given.
        lambda_range: The least and the largest λ to permit; if not given, the adapter's own range,
            [0, 1] for a pair, and for two prompts that of their calibration, or [0, 1].
        gate: As in :func:`flexalign.fusion.fuse`, for every request.
        any_base: Accept an adapter that was made for another base.
        dtype: Data type of the weights.
        context: The most tokens of a prompt and its answer together; the model's own limit if
            that is lower.
        limits: The limits of the engine.
        template: Arguments of the chat template, for every request.
        prompts: Instead of an adapter or an aligned model, the two prompts of the model.
        by_id: Take special tokens of a pair for the same where only their names differ.
        calibration: The folder with the calibration of the two prompts.

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
    prompts: PromptPair | None = None
    by_id: bool = False
    calibration: str | PurePath | None = None

    def __post_init__(self) -> None:
        """Check all that needs no weights."""
        if self.adapter and self.aligned:
            raise ConfigError("give --adapter or --aligned, not both: each is a dial of its own.")
        # Raises if the prompts have another dial beside them.
        system = System.of(self.model, self.adapter, self.aligned, self.prompts)
        if self.by_id:
            require_two_models([system])
        if self.calibration is not None:
            require_two_prompts([system])
        if self.any_base and not self.adapter:
            raise ConfigError("--any-base is about an adapter; name --adapter.")
        is_dial = self.adapter or self.aligned or self.prompts
        if not is_dial and (self.lambda_range is not None or self.gate is not None):
            raise ConfigError(
                "--lambda-range and --gate are about a dial, and the model alone has none; name "
                "its --adapter, the --aligned model beside it, or an --aligned-prompt."
            )
        if self.context is not None and self.context < 2:
            raise ConfigError(f"--context must be at least 2 tokens, got {self.context}.")
        if self.gate is not None:  # the check of fuse, run on one token
            gated_lambda(torch.zeros(1), torch.zeros(1), 2.0, self.gate)


def load_service(options: ServeOptions) -> tuple[Service, DialRules]:
    """Load a model and start its engine.

    Raises:
        ConfigError: If a part does not exist.
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
        model.rendering if isinstance(model, TwoPromptDecoder) else None,
    )

    ends = end_ids(tokenizer, model.generation_config.eos_token_id)
    engine = Engine(runner, tokenizer, tags, ends, options.limits)
    engine.start()
    return Service(served, engine, options.limits.queue), rules


def _open(options: ServeOptions) -> tuple[Runner, Any, ThinkingTags | None, DialRules]:
    """Open the model, the pair or the dial.

    Returns:
        Its runner, its tokenizer, its thinking tags if an adapter has them, and its rules.
    """
    backend = LocalBackend(
        System.of(options.model, options.adapter, options.aligned, options.prompts),
        options=SystemOptions(
            gate=options.gate,
            dtype=options.dtype,
            lambda_range=options.lambda_range,
            any_base=options.any_base,
            template=options.template,
            prompts=options.prompts,
            by_id=options.by_id,
            calibration=options.calibration,
        ),
    )

    tokenizer, settings = backend.text.tokenizer, backend.config
    if backend.kind == "model":
        rules = DialRules(None, template_effort=_effort_arguments(tokenizer))
        return PlainRunner(backend.load()), tokenizer, None, rules
    if settings is None:
        is_prompts = backend.kind == "prompts"
        refusal = PROMPTS_NOT_CALIBRATED if is_prompts else _PAIR_EFFORT
        limits = options.lambda_range or (0.0, 1.0)
        rules = DialRules(Fixed(1.0), limits, without_effort=refusal)
    else:
        rules = adapter_rules(settings, options.lambda_range)
    low, high = rules.lambda_range
    if options.gate is not None and low >= 0 and high <= 1:
        warnings.warn(
            "--gate has no effect: it is about λ outside [0, 1], and --lambda-range permits none.",
            stacklevel=3,
        )
    if backend.kind == "prompts":
        return TwoPromptRunner(backend.load(), options.gate), tokenizer, None, rules
    if settings is None:
        decoder = backend.load()
        PromptSettings(options.template).bind(decoder.tokenizer)
        return PairRunner(decoder, options.gate), decoder.tokenizer, None, rules

    model = backend.load()
    # The model would warn of a λ outside its own range, but the operator's range decides.
    permitted = settings.widened(rules.lambda_range)
    model.dial_config = replace(permitted, lambda_range=rules.lambda_range)
    is_lora = isinstance(model, LoRADial)
    runner = LoRARunner(model) if is_lora else InRaRunner(model, options.gate)
    return runner, tokenizer, settings.tags, rules


def _effort_arguments(tokenizer: Any) -> tuple[str, ...]:
    """Return the arguments of a chat template that a ``reasoning_effort`` sets."""
    known = template_variables(tokenizer)
    return tuple(name for name in EFFORT_ARGUMENTS if name in known)


def _sides(model: Any) -> Sequence[Any]:
    return [model.reference, model.aligned] if isinstance(model, TwoModelDecoder) else [model]


def require_safe_address(host: str, key: str | None, *, insecure: bool) -> None:
    """Refuse an address that other machines can reach, if there is no key.

    Raises:
        ConfigError: If the address is not a loopback one, there is no key, and ``insecure`` is
            false.
    """
    if not is_loopback(host) and key is None and not insecure:
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no key; name the environment "
            "variable that holds one with --api-key-env, or say --insecure."
        )


def run_server(
    app: Any,
    listening: socket.socket,
    *,
    grace: float,
    is_well: Callable[[], bool],
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; then refuse new requests and finish the running ones.

    Args:
        app: The ASGI application.
        listening: The socket of :func:`flexalign.serving.address.open_socket`.
        grace: Seconds in which running answers must finish.
        is_well: Returns whether the engine runs. If it does not, the server ends too, so that a
            process manager can restart it.
        on_ready: Called once, when SIGTERM ends the server as described; it prints the address.

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
    server = _UvicornServer(config, is_well)
    # Before uvicorn has handlers of its own, a SIGTERM must not be lost. After it has stopped, it
    # raises the signal again, and a clean end must not look like a failure.
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        on_ready()
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
    if not is_well():
        raise ServingError("the engine has failed; the log above says why. Start the server again.")


class _UvicornServer(uvicorn.Server):
    """A server that ends when the engine has ended."""

    def __init__(self, config: uvicorn.Config, is_well: Callable[[], bool]) -> None:
        super().__init__(config)
        self._is_well = is_well

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends; uvicorn calls this ten times a second."""
        return not self._is_well() or await super().on_tick(counter)
