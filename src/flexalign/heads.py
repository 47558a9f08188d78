"""The head of a language model: the function from the last hidden state to logits.

A head is ``softcap·tanh(scale·(h·Wᵀ + b)/softcap)``: a matrix product in most families, a scaled
one in Granite and Cohere, a capped one in Gemma 2. :meth:`Head.of` reads the parameters from a
model and compares the result with the model's logits, so that a model with another kind of head is
refused and not approximated. :func:`last_hidden` runs the model up to the head.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexalign._modes import evaluating
from flexalign.errors import PairMismatchError, UnsupportedModelError

_DIVISORS = ("logits_scaling",)
_FACTORS = ("logit_scale", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_PROBE_TOKENS = 7
_PROBE_TOLERANCE = 1e-5
"""Relative to the largest logit. In half precision, two units in the last place are permitted."""


@dataclass(frozen=True, eq=False)
class Head:
    """A head: ``logits = softcap·tanh(scale·(hidden·weightᵀ + bias)/softcap)``.

    Attributes:
        weight: Shape ``(V, H)``. The model's own parameter, so gradients reach it.
        bias: Shape ``(V,)``, or None.
        scale: The factor of the product.
        softcap: The bound of the logits, by a tanh; None: no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module, *, probe: bool = True) -> "Head":
        """Read the head of a causal language model and check it against the model's logits.

        Args:
            model: A transformers causal language model, or a PEFT wrapper of one.
            probe: Run a few tokens through the model and compare the logits. Set it to False only
                if the model cannot run (sharded weights, or weights on the meta device).

        Raises:
            UnsupportedModelError: If there is no plain head, if PEFT adapts it, if it is
                quantised, or if its logits differ from the model's.
        """
        plain = _unwrap(model)
        output = getattr(plain, "get_output_embeddings", lambda: None)()
        head = _read(output, plain)
        if probe:
            _check(head, model, _name(plain))
        return head

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits, shape ``(..., V)``, of hidden states of shape ``(..., H)``."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the head scores, padding included."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Width of the hidden state that the head takes."""
        return self.weight.shape[1]

    def cut(self, vocab_size: int) -> "Head":
        """Return the head of the first ``vocab_size`` tokens, which shares this head's storage.

        Raises:
            PairMismatchError: If the head has fewer tokens than that.
        """
        if vocab_size > self.vocab_size:
            raise PairMismatchError(
                f"a head of {self.vocab_size} tokens cannot be cut to {vocab_size}; "
                "cut both models to the smaller vocabulary."
            )
        if vocab_size == self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)


def last_hidden(model: nn.Module, **inputs: Any) -> Tensor:
    """Run a model up to its head; return the final, normalised hidden states that the head takes.

    No cache is built, because with a cache packed documents would see each other.

    Args:
        model: A transformers causal language model (of a vision-language model, the text model),
            or a PEFT wrapper of one, which runs with its active adapter.
        **inputs: ``input_ids``, ``attention_mask``, ``position_ids`` and other arguments of the
            model's decoder. Those that are None are left out.

    Returns:
        Shape ``(B, T, H)``.

    Raises:
        UnsupportedModelError: If the model has no decoder of its own, or if PEFT adds virtual
            tokens to its input (prompt and prefix tuning).
    """
    active = getattr(model, "active_peft_config", None)
    if active is not None and active.is_prompt_learning:
        raise UnsupportedModelError(
            f"the PEFT adapter is of type {active.peft_type}, which adds virtual tokens to the "
            "input; use an adapter that changes weights, such as LoRA."
        )

    plain = _unwrap(model)
    decoder: Any = decoder_of(plain)
    if decoder is None:
        raise UnsupportedModelError(
            f"{_name(plain)}: no decoder apart from the head was found; "
            "give a transformers causal language model."
        )

    given = {name: value for name, value in inputs.items() if value is not None}
    hidden: Tensor = decoder(**given, use_cache=False, return_dict=True)[0]
    return hidden


def decoder_of(model: nn.Module) -> nn.Module | None:
    """Return the part of a causal language model before its head.

    transformers does not find it in text models whose name for it is their family's for the whole
    (Llama 4's and Mllama's, apart from their vision towers); there it is the one module beside the
    head.

    Args:
        model: A transformers model.

    Returns:
        The decoder; None if there is none apart from the head.
    """
    plain: Any = model
    head = getattr(plain, "get_output_embeddings", lambda: None)()
    decoder = getattr(plain, "get_decoder", lambda: plain)()
    if decoder is plain:
        others = [part for part in plain.children() if part is not head]
        decoder = others[0] if head is not None and len(others) == 1 else None
    return None if decoder is head else cast("nn.Module", decoder)


def can_mix_hidden(reference: Head, aligned: Head, gate: float | None = None) -> bool:
    """Return whether two hidden states may be mixed before one head product.

    They may if that gives equation 5 exactly: both models have the same head (the same storage), it
    is linear, and there is no gate, which needs the logits of both models.
    """
    return (
        gate is None
        and reference.softcap is None
        and aligned.softcap is None
        and reference.scale == aligned.scale
        and _is_same(reference.weight, aligned.weight)
        and _is_same(reference.bias, aligned.bias)
    )


def are_equal(one: Head, other: Head) -> bool:
    """Return whether two heads have equal values, so that either may stand for both.

    It reads all weights, so ask once and not at every step.
    """
    return (
        one.softcap == other.softcap
        and one.scale == other.scale
        and _has_equal_values(one.weight, other.weight)
        and _has_equal_values(one.bias, other.bias)
    )


def _has_equal_values(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    is_comparable = one.dtype == other.dtype and one.device == other.device and not one.is_meta
    return is_comparable and torch.equal(one, other)


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
        and not one.is_meta
    )


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper; its layers still have their adapters."""
    wrapper: Any = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        plain: nn.Module = wrapper.get_base_model()
        return plain
    return model


def _name(model: nn.Module) -> str:
    family = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (family {family})" if family else type(model).__name__


def _read(output: Any, model: nn.Module) -> Head:
    if type(output).__module__.startswith("peft."):
        raise UnsupportedModelError(
            f"{_name(model)}: a PEFT adapter changes its head, so the head is not one matrix; "
            "leave lm_head out of the adapter's target modules and of modules_to_save, "
            "or merge the adapter first (merge_and_unload)."
        )

    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnsupportedModelError(
            f"{_name(model)}: it has no output matrix (get_output_embeddings gave "
            f"{type(output).__name__}); give a causal language model."
        )
    if not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{_name(model)}: its head is quantised ({weight.dtype}); load the model de-quantised."
        )

    # Families use different names for the same parameters. A missing one has no effect.
    config: Any = model.config
    text_config = config.get_text_config()
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(text_config, name) or 1.0
    for name in _DIVISORS:
        scale /= _number(text_config, name) or 1.0
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(text_config, name))), None)
    return Head(weight, getattr(output, "bias", None), scale, softcap)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None


@torch.no_grad()
def _check(head: Head, model: nn.Module, name: str) -> None:
    """Check that ``head(last_hidden)`` agrees with the model's logits on a few tokens.

    Raises:
        UnsupportedModelError: If they differ by more than rounding.
    """
    device = head.weight.device
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=device) % head.vocab_size
    inputs = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}
    with evaluating(model):
        expected = model(**inputs, use_cache=False).logits.float()
        found = head(last_hidden(model, **inputs)).float()

    if found.shape == expected.shape:
        size = expected.abs().max()
        off = float((found - expected).abs().max() / size.clamp(min=torch.finfo(size.dtype).tiny))
        if off <= max(2 * torch.finfo(head.weight.dtype).eps, _PROBE_TOLERANCE):
            return
        problem = f"its head, read as {_describe(head)}, misses its logits by {off:.1%}"
    else:
        problem = (
            f"its head gives {tuple(found.shape)} where its logits are {tuple(expected.shape)}"
        )
    raise UnsupportedModelError(
        f"{name}: {problem}; its logits are not a (scaled, capped) matrix product of the last "
        "hidden state, which the chunked loss and the fused decoder need."
    )


def _describe(head: Head) -> str:
    parts = [f"a {head.vocab_size}×{head.width} matrix"]
    if head.bias is not None:
        parts.append("a bias")
    if head.scale != 1.0:
        parts.append(f"scale {head.scale:g}")
    if head.softcap is not None:
        parts.append(f"soft-cap {head.softcap:g}")
    return ", ".join(parts)
