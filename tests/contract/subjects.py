"""What the contract's checks run on: every family, small, with nothing in it left at zero."""

import copy
import inspect
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import FAMILIES, MUST_PASS, family_config, family_model
from flexalign.inra import InRaModel
from flexalign.inra.adapter import decoder_layers
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.models.loading import fingerprint

REFUSED = ("bloom", "mpt", "mamba", "jamba", "qwen3_next")
"""ALiBi tables with rows of their own for every head, and layers that are recurrent."""

assert not set(MUST_PASS) & set(REFUSED)
SERVED = tuple(family for family in FAMILIES if family not in REFUSED)

LAMBDAS = [-0.5, 0.0, 0.3, 1.0, 2.0]

WINDOW = 4
"""Sliding windows, where a family has them, are shorter than the prompts."""


RECURRENT = ("mamba", "jamba")
"""The last bit of a scan depends on where its tensors lie in memory."""

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA_TARGETS: dict[str, list[str]] = {
    "mixtral": _ATTENTION,
    "gpt_oss": _ATTENTION,
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "qwen3_next": [*_ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"],
    "mamba": ["in_proj", "x_proj"],
    "jamba": [*_ATTENTION, "in_proj", "x_proj"],
}
"""The modules of a LoRA, where PEFT's "all-linear" would take fused experts or is refused."""


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


class DialSubject(NamedTuple):
    """A base, a LoRA dial on a copy of it, and the batch of :class:`Subject`.

    Attributes:
        base: The base model, without a LoRA.
        dial: The model with the dial.
        batch: The prompts, as a model takes them; ``(3, 9)`` with three tokens of padding.
    """

    base: PreTrainedModel
    dial: LoRADial
    batch: dict[str, Tensor]

    @property
    def real(self) -> Tensor:
        """Where no padding is, shape ``(3, 9)``."""
        return self.batch["attention_mask"].bool()


def put_lora(base: PreTrainedModel, size: float = 0.15, **settings: Any) -> PeftModel:
    """Put a random LoRA into a base, in evaluation mode."""
    torch.manual_seed(5)
    modules = LORA_TARGETS.get(base.config.model_type, "all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself, and says so
        model = get_peft_model(base, LoraConfig(**({"r": 4, "target_modules": modules} | settings)))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = size * torch.randn_like(parameter)
    return model.eval()


@cache
def dial_subject_of(family: str) -> DialSubject:
    """Build a family's base and a LoRA dial on it, once."""
    base = make_base(family)
    settings = LoRADialConfig("base", fingerprint(base), lambda_range=(-1.0, 5.0))
    dial = LoRADial(put_lora(copy.deepcopy(base)), settings).eval()
    tokens = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    if "position_ids" in inspect.signature(base.forward).parameters:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return DialSubject(base, dial, batch)


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
