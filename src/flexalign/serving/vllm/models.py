"""vLLM's models with a second stream: one mixin for the decoders, one for what stands around them.

Of each family the stock classes are kept. The two streams are stacked along the tokens, ``(2N, H)``,
base first, so that each weight is read once; the adapter stream alone goes through the adapter's
layers, which are layers of the stock class. In every layer the attention is doubled: the same
weights, but each stream with its own keys and values, which depend on no λ. After the last norm
the two are mixed by the λ of each token, and the stock head does the rest.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import llama, mistral, qwen2, qwen3

from flexalign.errors import UnsupportedModelError
from flexalign.fusion import fuse_hidden
from flexalign.heads import Head, can_mix_hidden
from flexalign.serving.vllm import runner_v1
from flexalign.serving.vllm.lambdas import DialSettings, TokenLambdas
from flexalign.serving.vllm.plugin import refuse_unsupported, require_supported

require_supported()


class _PairedAttention(nn.Module):
    """Attention of both streams; each has its own cache, the weights around it are shared."""

    def __init__(self, base: Any, adapter: Any) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: ``(2N, width)``, base stream first, as is the result."""
        half = query.shape[0] // 2
        return torch.cat(
            [
                self.base(query[:half], key[:half], value[:half]),
                self.adapter(query[half:], key[half:], value[half:]),
            ]
        )


class _TwoStreams:
    """For a decoder: the adapter's layers before layer 0, and both streams through all layers."""

    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        settings = DialSettings.of(vllm_config.model_config.hf_config)
        kind = type(self.layers[0])
        self.adapter = nn.ModuleList(
            _layer(kind, vllm_config, f"{prefix}.adapter_{index}.0")
            for index in range(settings.adapter_layers)
        )
        for layer in self.layers:
            attention: Any = layer.self_attn
            attention.attn = _PairedAttention(attention.attn, _twin(attention.attn, vllm_config))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return both streams' hidden states before the head, ``(2N, H)``, base first."""
        base = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        adapted: Tensor = base
        residual: Any = None
        for layer in self.adapter:
            adapted, residual = layer(positions, adapted, residual)
        hidden = torch.cat([base, adapted + residual])
        positions = torch.cat([positions, positions])
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        normed: Tensor = self.norm(hidden, residual)[0]
        return normed


class _WithDial:
    """For a causal language model: a decoder with two streams, and a λ for each token.

    Attributes:
        lambdas: What the model runner writes each batch's λ into.
    """

    stock: tuple[ModuleType, str]
    """The module of the stock classes, and the name of the decoder in it."""

    model: nn.Module
    lm_head: Any
    logits_processor: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_unsupported(vllm_config)
        with _two_streams(*self.stock):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._require_linear_head()
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        settings = DialSettings.of(vllm_config.model_config.hf_config)
        self.lambdas = TokenLambdas(torch.zeros(tokens, dtype=torch.float32), settings)
        if vllm_config.use_v2_model_runner:
            from flexalign.serving.vllm import runner_v2

            runner_v2.require_delivery(vllm_config, self)
        else:
            runner_v1.install()
            runner_v1.require_delivery()

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the fused hidden states, ``(N, H)``."""
        hidden = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        base, adapter = hidden.chunk(2)
        mixed = fuse_hidden(base, adapter, self.lambdas.values[: len(base)])
        return mixed.to(base.dtype)

    @staticmethod
    def get_model_state_cls() -> type:
        """Return what vLLM's model runner V2 keeps of each request for this model."""
        from flexalign.serving.vllm.runner_v2 import DialModelState

        return DialModelState

    def _require_linear_head(self) -> None:
        processor = self.logits_processor
        bias = getattr(self.lm_head, "bias", None)
        head = Head(self.lm_head.weight, bias, processor.scale, processor.soft_cap)
        if not can_mix_hidden(head, head):
            raise UnsupportedModelError(
                f"{type(self).__name__}: its head is not linear, so that hidden states cannot be "
                "mixed before it; serve it with --engine local."
            )


def _with_dial(module: ModuleType, name: str, decoder: str) -> type:
    """Return the model ``name`` of one of vLLM's modules, with a dial."""
    stock = getattr(module, name)
    body = {"stock": (module, decoder), "__module__": __name__, "__doc__": f"{name} with a dial."}
    return type(f"InRa{name}", (_WithDial, stock), body)


@contextmanager
def _two_streams(module: ModuleType, name: str) -> Iterator[None]:
    """Let a module's models build a decoder with two streams in the place of the stock one.

    There is no other way in that all families have: some build their decoder in a method that can
    be overridden, some do not.
    """
    stock = getattr(module, name)
    setattr(module, name, type(f"InRa{name}", (_TwoStreams, stock), {"__module__": __name__}))
    try:
        yield
    finally:
        setattr(module, name, stock)


def _layer(kind: type, vllm_config: Any, prefix: str) -> nn.Module:
    """Build a decoder layer of a stock class; they differ in what they want to be told."""
    known = {
        "vllm_config": vllm_config,
        "config": vllm_config.model_config.hf_config,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "prefix": prefix,
    }
    wanted = inspect.signature(kind).parameters
    layer: nn.Module = kind(**{name: known[name] for name in wanted if name in known})
    return layer


def _twin(attention: Any, vllm_config: Any) -> nn.Module:
    """Build an attention like another one, under a name and with a cache of its own."""
    twin: nn.Module = Attention(
        attention.num_heads,
        attention.head_size,
        attention.impl.scale,
        num_kv_heads=attention.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        per_layer_sliding_window=attention.sliding_window,
        attn_type=attention.attn_type,
        prefix=f"{attention.layer_name}_adapter",
    )
    return twin


InRaLlamaForCausalLM = _with_dial(llama, "LlamaForCausalLM", "LlamaModel")
InRaMistralForCausalLM = _with_dial(mistral, "MistralForCausalLM", "MistralModel")
InRaQwen2ForCausalLM = _with_dial(qwen2, "Qwen2ForCausalLM", "Qwen2Model")
InRaQwen3ForCausalLM = _with_dial(qwen3, "Qwen3ForCausalLM", "Qwen3Model")
