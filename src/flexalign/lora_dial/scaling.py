"""One LoRA at any strength: a factor λ on the low-rank term of every LoRA layer of a PEFT model.

A LoRA layer computes ``W·x + s·B·(A·x)``. :class:`LoRAScale` makes it ``W·x + s·B·(λ·A·x)``: the
low-rank term times λ, computed where the tensor is smallest. PEFT's own modules run otherwise
unchanged, so autograd, dropout, gradient checkpointing, DDP, FSDP and mixed precision work as
without it. λ = 1 is PEFT's own forward and λ = 0 the base model, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.lambdas import finite_lambda

Strength: TypeAlias = float | Tensor | None
"""λ: one number, ``(B,)``, ``(B, T)``, or None for the stock strength, which is λ = 1."""

_VARIANTS = {
    "use_dora": "DoRA, whose direction is normalised",
    "alora_invocation_tokens": "activated LoRA, which begins in the middle of a prompt",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the base's weights",
    "monteclora_config": "MonteCLoRA, which samples its weights",
    "velora_config": "VeLoRA, which compresses activations",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools its input",
    "layer_replication": "replicated layers, which the base does not have",
    "trainable_token_indices": "trained token embeddings, which have no strength",
    "modules_to_save": "whole copies of modules, which have no strength",
    "lora_bias": "a bias in its B matrices",
    "target_parameters": "LoRA on bare parameters, such as fused experts (name target_modules "
    "without them, such as those of the attention, instead of all-linear)",
}
"""Settings of a LoRA that cannot be scaled, or not by a factor on the low-rank term."""

_CHANGED_BASES = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
"""Initialisations that change the base's weights; a saved adapter of them does not fit the base."""


class LoRAScale:
    """The strength λ of one LoRA of a PEFT model.

    λ remains until it is changed, because gradient checkpointing runs the forward again during
    backward. Not thread-safe: a model has one strength at a time.

    Attributes:
        layers: The LoRA layers, by name.
        lam: λ as it was set; None is the stock strength.
    """

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        """Find the adapter's layers and put λ into them.

        Args:
            model: A model with the adapter, not merged, before FSDP or DDP wrap it.
            adapter: The adapter's name in the model.

        Raises:
            ConfigError: If the model has no such adapter, or it is merged.
            UnsupportedModelError: If the adapter's effect is not linear in its strength, or a layer
                is not a plain linear one, for example because its weights are quantised.
        """
        self.layers = lora_layers(model, adapter)
        self.lam: Strength = None
        self._factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._hooks = [
            layer.lora_B[adapter].register_forward_pre_hook(self._scaled)
            for layer in self.layers.values()
        ]

    def set(self, lam: Strength) -> None:
        """Set λ for all following forwards, and for the backward that belongs to them.

        Args:
            lam: One number, one per row ``(B,)``, one per row and token ``(B, T)``, or None.

        Raises:
            LambdaError: If a number is not finite, or a tensor has another number of dimensions.
        """
        if isinstance(lam, Tensor):
            if lam.ndim not in (1, 2):
                raise LambdaError(
                    f"λ must have the shape (B,) or (B, T), got {tuple(lam.shape)}; give one "
                    "number for all rows."
                )
        elif lam is not None:
            lam = finite_lambda(lam, "λ")
        self.lam = lam
        self._factors = {}

    @contextmanager
    def at(self, lam: Strength) -> Iterator[None]:
        """Set λ inside the block and restore the one before. For forwards without a backward."""
        before = self.lam
        self.set(lam)
        try:
            yield
        finally:
            self.set(before)

    def remove(self) -> None:
        """Take λ out of the model again: its strength is then the stock one."""
        for hook in self._hooks:
            hook.remove()

    def _scaled(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Return the input of a B matrix, ``(B, …, r)``, times λ."""
        lam, hidden = self.lam, inputs[0]
        if lam is None:
            return None
        if isinstance(lam, Tensor):
            return ((hidden * self._factor(lam, hidden)).to(hidden.dtype),)
        return None if lam == 1.0 else (hidden * lam,)

    def _factor(self, lam: Tensor, hidden: Tensor) -> Tensor:
        """Return λ in the shape that multiplies ``hidden``, in float32 or in its higher precision.

        Raises:
            LambdaError: If λ does not fit the tokens that the layer gets.
        """
        key = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
        factor = self._factors.get(key)
        if factor is None:
            factor = self._factors[key] = lam.to(*key)

        # Some layers get all tokens in one list: row after row, as reshape(-1, H) makes it.
        if hidden.ndim == 2:
            tokens, rest = divmod(len(hidden), factor.numel())
            if rest == 0 and (factor.ndim == 1 or tokens == 1):
                return factor.reshape(-1).repeat_interleave(tokens)[:, None]
        elif hidden.shape[: factor.ndim] == factor.shape:
            return factor[(...,) + (None,) * (hidden.ndim - factor.ndim)]
        raise LambdaError(
            f"λ of shape {tuple(lam.shape)} does not fit the input {tuple(hidden.shape)} of a LoRA "
            "layer; give one number, one per row, or one per row and token."
        )


def lora_layers(model: PeftModel, adapter: str = "default") -> dict[str, Linear]:
    """Return a LoRA's layers by name, if its effect is linear in its strength.

    Raises:
        ConfigError: If the model has no such adapter, or it is merged.
        UnsupportedModelError: If the effect is not linear in the strength, or a layer is not a
            plain linear one.
    """
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None:
        raise ConfigError(
            f"{type(model).__name__} has no adapter {adapter!r}; load a LoRA into it."
        )
    require_linear(config, f"the adapter {adapter!r}")

    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            _require_plain(layer, name, adapter)
            layers[name] = layer
    if not layers:
        raise ConfigError(f"the adapter {adapter!r} changes no layer of {type(model).__name__}.")
    return layers


def require_linear(config: Any, name: str) -> None:
    """Refuse an adapter whose effect is not linear in its strength.

    Args:
        config: A PEFT configuration.
        name: The adapter's name in messages.

    Raises:
        UnsupportedModelError: If it is not a LoRA, or one of a variant that cannot be scaled.
    """
    if not isinstance(config, LoraConfig):
        raise UnsupportedModelError(
            f"{name} is of type {config.peft_type}; only a LoRA has a strength that λ can be."
        )

    known = {field.name for field in fields(config)}
    for setting, meaning in _VARIANTS.items():
        if setting in known and getattr(config, setting):
            raise UnsupportedModelError(
                f"{name} has {setting}: {meaning}. λ cannot be its strength; train a plain LoRA."
            )
    if config.bias != "none":
        raise UnsupportedModelError(
            f"{name} has bias={config.bias!r}: it changes biases of the base, which have no "
            "strength. λ cannot be its strength; train with bias: none."
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise UnsupportedModelError(
            f"{name} has init_lora_weights={start!r}, which changes the base's weights, so that "
            "λ = 0 would not be the base; train with PEFT's default."
        )


def _require_plain(layer: LoraLayer, name: str, adapter: str) -> None:
    """Refuse a LoRA layer that is not a plain linear one.

    Raises:
        ConfigError: If the adapter is merged into the layer.
        UnsupportedModelError: If the layer or its base is of another type.
    """
    base: Any = layer.get_base_layer()
    if type(layer) is not Linear or not _is_plain(type(base)):
        raise UnsupportedModelError(
            f"{name} is a {type(base).__name__} under PEFT's {type(layer).__name__}; λ scales LoRA "
            "on torch's Linear and the linear layers of transformers' models alone. Leave this "
            "module out of target_modules; if it is a quantised layer, load the base without "
            "quantisation."
        )
    if not base.weight.is_floating_point() or base.weight.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{name} has weights of {base.weight.dtype}; load the base without quantisation."
        )
    if adapter in layer.lora_variant:
        raise UnsupportedModelError(
            f"{name} is a {type(layer.lora_variant[adapter]).__name__}; λ scales plain LoRA alone."
        )
    if name.rpartition(".")[2] in ("lm_head", "embed_out"):
        raise UnsupportedModelError(
            f"the adapter changes {name}, whose weights the embeddings may share; leave the head "
            "out of target_modules."
        )
    if layer.merged:
        raise ConfigError(f"the adapter {adapter!r} is merged into {name}; unmerge it first.")


def _is_plain(kind: type) -> bool:
    """Whether a class of layers is linear: torch's, GPT-2's, or one that a model's file defines.

    Quantised layers are subclasses too; they are in transformers.integrations and other packages.
    """
    if kind in (nn.Linear, Conv1D):
        return True
    return issubclass(kind, nn.Linear) and kind.__module__.startswith("transformers.models.")
