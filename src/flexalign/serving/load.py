"""From names on the command line to a service: the model, its engine, its rules."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flexalign.data.thinking import ThinkingTags
from flexalign.decoding import TwoModelDecoder
from flexalign.errors import ConfigError
from flexalign.fusion import gated_lambda
from flexalign.inra import InRaModel
from flexalign.loading import load_model, load_tokenizer
from flexalign.pairing import ModelPair
from flexalign.policies import Fixed
from flexalign.serving.dial import DialRules
from flexalign.serving.engine import (
    Engine,
    EngineLimits,
    InRaRunner,
    PairRunner,
    PlainRunner,
    Runner,
)
from flexalign.serving.rules import adapter_rules
from flexalign.serving.service import ServedModel, Service

__all__ = ["ServeOptions", "load_service"]


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

    def __post_init__(self) -> None:
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
        if self.gate is not None:
            gated_lambda(torch.zeros(1), torch.zeros(1), 2.0, self.gate)


def load_service(options: ServeOptions) -> tuple[Service, DialRules]:
    """Load a model and start its engine.

    Raises:
        ConfigError: If a part is not there.
        CheckpointError: If a part is damaged.
        PairMismatchError: If parts do not fit together.
        UnsupportedModelError: If the engine cannot run the model.
    """
    runner, tokenizer, tags, rules = _load(options)
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


def _load(options: ServeOptions) -> tuple[Runner, Any, ThinkingTags | None, DialRules]:
    device = "cuda" if torch.cuda.is_available() else None
    loading: dict[str, Any] = {"dtype": options.dtype, "device_map": device}
    if options.aligned:
        pair = ModelPair.load(options.model, options.aligned, **loading)
        rules = DialRules(Fixed(1.0), options.lambda_range or (0.0, 1.0))
        return PairRunner(TwoModelDecoder(pair), options.gate), pair.tokenizer, None, rules
    if not options.adapter:
        plain = load_model(options.model, **loading)
        return PlainRunner(plain), load_tokenizer(options.model), None, DialRules(None)
    model = InRaModel.from_pretrained(
        options.model, options.adapter, any_base=options.any_base, **loading
    )
    settings = model.inra_config
    rules = adapter_rules(settings, options.lambda_range)
    model.inra_config = replace(settings, lambda_range=rules.lambda_range)
    return InRaRunner(model, options.gate), load_tokenizer(options.model), settings.tags, rules


def _sides(model: Any) -> Sequence[Any]:
    return [model.reference, model.aligned] if isinstance(model, TwoModelDecoder) else [model]


def _ends(given: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's and its tokenizer's."""
    own = given if isinstance(given, list | tuple) else [given]
    return [int(end) for end in dict.fromkeys([*own, tokenizer.eos_token_id]) if end is not None]
