"""What the contract's checks run on: every family, small, with nothing in it left at zero."""

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import FAMILIES, MUST_PASS, family_config, family_model
from flexalign.inra import InRaModel
from flexalign.inra.adapter import decoder_layers

REFUSED = ("bloom", "mpt", "mamba", "jamba", "qwen3_next")
"""ALiBi tables with rows of their own for every head, and layers that are recurrent."""

assert not set(MUST_PASS) & set(REFUSED)
SERVED = tuple(family for family in FAMILIES if family not in REFUSED)

LAMBDAS = [-0.5, 0.0, 0.3, 1.0, 2.0]

WINDOW = 4
"""Sliding windows, where a family has them, are shorter than the prompts."""


class Subject(NamedTuple):
    """A base, its model with an adapter that is no identity, and a batch of prompts.

    Attributes:
        base: The base model.
        model: The model with the dial.
        tokens: Shape ``(3, 9)``.
        mask: Its attention mask; the first row has three tokens of padding on the left.
        positions: Its positions, counted from each row's first token on.
    """

    base: PreTrainedModel
    model: InRaModel
    tokens: Tensor
    mask: Tensor
    positions: Tensor

    @property
    def real(self) -> Tensor:
        """Where no padding is, shape ``(3, 9)``."""
        return self.mask.bool()

    @property
    def batch(self) -> dict[str, Tensor]:
        """The prompts, as a model takes them."""
        return {
            "input_ids": self.tokens,
            "attention_mask": self.mask,
            "position_ids": self.positions,
        }

    @torch.no_grad()
    def plain(self) -> Tensor:
        """The base model's own logits."""
        logits: Tensor = self.base(**self.batch, use_cache=False).logits
        return logits


@torch.no_grad()
def stir(module: nn.Module, size: float, seed: int) -> None:
    """Move every parameter a little, so that no bias is zero and no scale is one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator)


def windowed(family: str) -> dict[str, Any]:
    """Return the settings that give a family short sliding windows, if it has any."""
    config = family_config(family)
    if not hasattr(config, "sliding_window"):
        return {}
    windows = {"sliding_window": WINDOW}
    if hasattr(config, "use_sliding_window"):
        windows |= {"use_sliding_window": True, "max_window_layers": 0}
    return windows


def make_base(family: str, **changes: Any) -> PreTrainedModel:
    """Build a family's base."""
    base = family_model(family, **windowed(family), **changes)
    stir(base, 0.05, seed=1)
    return base


@cache
def subject_of(family: str) -> Subject:
    """Build a family's subject, once."""
    base = make_base(family)
    model = InRaModel.create(base)
    stir(model.adapter, 0.05, seed=2)
    tokens = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Subject(base, model, tokens, mask, positions)


def inserted(base: PreTrainedModel, adapter: nn.Module) -> PreTrainedModel:
    """Build the model that really has the adapter as its layer 0, layer by layer from its config.

    Whatever the configuration lists per layer (attention types, rotary tables) gets one entry
    more, that of layer 0.
    """
    config = base.config
    depth = config.num_hidden_layers
    longer = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and name != "architectures":
            setattr(longer, name, [value[0], *value])
    longer.num_hidden_layers = depth + 1
    if hasattr(longer, "first_k_dense_replace"):
        longer.first_k_dense_replace += 1
    twin = AutoModelForCausalLM.from_config(longer).float().eval()
    own, layers = decoder_layers(twin, "twin"), decoder_layers(base, "base")
    (place,) = [name for name, module in base.named_modules() if module is layers]
    outside = {k: v for k, v in base.state_dict().items() if not k.startswith(f"{place}.")}
    missing = twin.load_state_dict(outside, strict=False)
    assert missing.unexpected_keys == []
    for target, source in zip(own, [adapter, *layers], strict=True):
        target.load_state_dict(source.state_dict())
    return twin
