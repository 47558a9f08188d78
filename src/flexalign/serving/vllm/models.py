"""vLLM's models with a dial: of each family the stock classes, with an InRa adapter or with a LoRA.

With InRa there are two streams. They are stacked along the tokens, ``(2N, H)``, base first, so that
each weight is read once; the adapter stream alone goes through the adapter's layers, which are
layers of the stock class. In every layer the attention is doubled: the same weights, but each
stream with its own keys and values, which depend on no λ. After the last norm the two are mixed by
the λ of each token, and the stock head does the rest.

With a LoRA dial there is one stream and one cache. A linear layer with a LoRA computes
``W·x + λ·B·(A·x)`` as two products, ``A·x`` and ``[W B]·[x; λ·A·x]``, both by vLLM's own kernels. The
keys and values depend on λ, so ``plugin`` has vLLM share a prefix at equal λ alone.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.models import llama, mistral, qwen2, qwen3
from vllm.model_executor.parameter import ModelWeightParameter, RowvLLMParameter

from flexalign.errors import CheckpointError, UnsupportedModelError
from flexalign.fusion import fuse_hidden
from flexalign.heads import Head, can_mix_hidden
from flexalign.serving.vllm import runner_v1
from flexalign.serving.vllm.lambdas import DialSettings, TokenLambdas
from flexalign.serving.vllm.plugin import (
    refuse_unsupported,
    require_separate_prefixes,
    require_supported,
)

require_supported()


class _WithDial:
    """For a causal language model: a λ for each token.

    Attributes:
        lambdas: What the model runner writes each batch's λ into.
    """

    lambdas: TokenLambdas

    @staticmethod
    def get_model_state_cls() -> type:
        """Return what vLLM's model runner V2 keeps of each request for this model."""
        from flexalign.serving.vllm.runner_v2 import DialModelState

        return DialModelState

    def _receive_lambdas(self, vllm_config: Any) -> None:
        """Make the place of the λ, and see that the model runner writes into it.

        Raises:
            ServingError: If it would not.
        """
        settings = DialSettings.of(vllm_config.model_config.hf_config)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.lambdas = TokenLambdas(
            torch.zeros(tokens, dtype=torch.float32),
            settings,
            needs_salt=settings.is_lora and bool(vllm_config.cache_config.enable_prefix_caching),
        )

        if vllm_config.use_v2_model_runner:
            from flexalign.serving.vllm import runner_v2

            runner_v2.require_delivery(vllm_config, self)
        else:
            runner_v1.install()
            runner_v1.require_delivery()


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


class _WithInRa(_WithDial):
    """For a causal language model: a decoder with two streams, mixed before the head."""

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
        self._receive_lambdas(vllm_config)

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

    def _require_linear_head(self) -> None:
        processor = self.logits_processor
        bias = getattr(self.lm_head, "bias", None)
        head = Head(self.lm_head.weight, bias, processor.scale, processor.soft_cap)
        if not can_mix_hidden(head, head):
            raise UnsupportedModelError(
                f"{type(self).__name__}: its head is not linear, so that hidden states cannot be "
                "mixed before it; serve it with --engine local."
            )


def _with_inra(module: ModuleType, name: str, decoder: str) -> type:
    """Return the model ``name`` of one of vLLM's modules, with an InRa adapter."""
    stock = getattr(module, name)
    body = {"stock": (module, decoder), "__module__": __name__, "__doc__": f"{name} with InRa."}
    return type(f"InRa{name}", (_WithInRa, stock), body)


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


class _WithLoRA(_WithDial):
    """For a causal language model: a LoRA in its linear layers, of the strength λ of each token."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_unsupported(vllm_config)
        if vllm_config.cache_config.enable_prefix_caching:
            require_separate_prefixes()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._receive_lambdas(vllm_config)

        module = cast("nn.Module", self)
        for name, ranks in (self.lambdas.settings.ranks or {}).items():
            layer: Any = module.get_submodule(name)
            method = layer.quant_method
            if not isinstance(layer, LinearBase) or type(method) is not UnquantizedLinearMethod:
                raise UnsupportedModelError(
                    f"{name} is no linear layer of plain weights, so that a LoRA is not served on "
                    "it; serve the dial with --engine local."
                )
            layer.quant_method = _LoRALinearMethod(layer, ranks, self.lambdas.values)


class _LoRALinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """How a linear layer with a LoRA computes ``W·x + λ·B·(A·x)``.

    vLLM's layers are merged: ``qkv_proj`` has three parts, ``gate_up_proj`` two, and each part its
    own A and B. All A are one matrix, and B is block-diagonal beside the weights, so that a layer
    costs one product more than without. λ multiplies the small tensor between the two.

    With tensor parallelism the parts of A and B are those of the weights: B's rows are split where
    the weights' rows are, and A's columns where the weights' columns are. There each process adds
    its share of ``B·A·x`` before the sum over the processes that the layer makes anyway.
    """

    def __init__(self, layer: Any, ranks: Sequence[int], lambdas: Tensor) -> None:
        """Give a layer the parameters ``lora_a.weight`` and ``lora_b``; vLLM loads them by name.

        Args:
            layer: The layer.
            ranks: The rank of each of its parts; 0 for a part without LoRA.
            lambdas: λ by token, longer than any batch.
        """
        super().__init__()
        self._ranks = tuple(ranks)
        self._sizes = _part_sizes(layer)
        self._lambdas = lambdas[:, None]

        weight = layer.weight
        down = torch.zeros(sum(ranks), weight.shape[1], dtype=weight.dtype)
        up = torch.zeros(weight.shape[0], max(ranks), dtype=weight.dtype)
        layer.lora_a = nn.Module()
        if isinstance(layer, RowParallelLinear):
            loader = layer.weight_loader_v2
            layer.lora_a.weight = RowvLLMParameter(data=down, input_dim=1, weight_loader=loader)
            layer.lora_b = _parameter(up, _load_whole)
        else:
            layer.lora_a.weight = _parameter(down, self._load_down)
            layer.lora_b = ModelWeightParameter(
                data=up, input_dim=1, output_dim=0, weight_loader=layer.weight_loader_v2
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put B beside the weights; both matrices are then packed as vLLM packs weights."""
        blocks = [
            rows[:, :rank]
            for rows, rank in zip(layer.lora_b.data.split(self._sizes), self._ranks, strict=True)
        ]
        up = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        wide = torch.cat([layer.weight.data, up], dim=1)
        layer.weight = nn.Parameter(wide, requires_grad=False)
        del layer.lora_b
        super().process_weights_after_loading(layer)
        super().process_weights_after_loading(layer.lora_a)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output for the tokens ``x``, ``(N, input)``."""
        low = super().apply(layer.lora_a, x)
        # In place, so that one call multiplies in λ's float32 and rounds to the layer's type.
        low = low.mul_(self._lambdas[: x.shape[0]])
        output: Tensor = super().apply(layer, torch.cat([x, low], dim=-1), bias)
        return output

    def _load_down(self, parameter: Tensor, loaded: Tensor, part: str | int | None = None) -> None:
        """Load the A of one part of a layer."""
        index = _PARTS.get(part, part) or 0
        first = sum(self._ranks[:index])
        _load_whole(parameter[first : first + self._ranks[index]], loaded)


_PARTS: dict[Any, Any] = {"q": 0, "k": 1, "v": 2}
"""vLLM's names of the parts of ``qkv_proj``; those of other layers are numbers."""


def _parameter(data: Tensor, loader: Callable[..., None]) -> nn.Parameter:
    """Return a parameter that vLLM loads by ``loader``."""
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter


def _load_whole(parameter: Tensor, loaded: Tensor) -> None:
    if parameter.shape != loaded.shape:
        raise CheckpointError(
            f"a LoRA matrix is {tuple(loaded.shape)} and {tuple(parameter.shape)} was prepared; "
            "prepare the folder again."
        )
    parameter.data.copy_(loaded)


def _part_sizes(layer: Any) -> list[int]:
    """Return how many outputs each part of a layer has in this process."""
    sizes = getattr(layer, "output_partition_sizes", None)
    return list(sizes) if sizes else [layer.weight.shape[0]]


def _with_lora(module: ModuleType, name: str) -> type:
    """Return the model ``name`` of one of vLLM's modules, with a LoRA dial."""
    body = {"__module__": __name__, "__doc__": f"{name} with a LoRA dial."}
    return type(f"LoRADial{name}", (_WithLoRA, getattr(module, name)), body)


InRaLlamaForCausalLM = _with_inra(llama, "LlamaForCausalLM", "LlamaModel")
InRaMistralForCausalLM = _with_inra(mistral, "MistralForCausalLM", "MistralModel")
InRaQwen2ForCausalLM = _with_inra(qwen2, "Qwen2ForCausalLM", "Qwen2Model")
InRaQwen3ForCausalLM = _with_inra(qwen3, "Qwen3ForCausalLM", "Qwen3Model")
LoRADialLlamaForCausalLM = _with_lora(llama, "LlamaForCausalLM")
LoRADialMistralForCausalLM = _with_lora(mistral, "MistralForCausalLM")
LoRADialQwen2ForCausalLM = _with_lora(qwen2, "Qwen2ForCausalLM")
LoRADialQwen3ForCausalLM = _with_lora(qwen3, "Qwen3ForCausalLM")
