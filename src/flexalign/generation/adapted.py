"""One base model with a dial: what InRa models, LoRA dials and two prompts have in common.

:class:`BasedModel` is a :class:`~flexalign.generation.fused.FusedDecoding` whose other attributes are
those of one base. :class:`AdaptedModel` adds the settings of a trained dial: its default λ, its range,
its thinking tags and its calibrated threshold. :func:`load_base` and :func:`load_own_base` load the
base.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.fusion import Lambda, as_lambda
from flexalign.generation.dial_config import DialConfig, require_base
from flexalign.generation.fused import FusedDecoding
from flexalign.generation.row_lambdas import RowDials, read_dials
from flexalign.lambdas import Adaptive, Dial, OnlyEnds
from flexalign.models.loading import fingerprint, load_model, load_tokenizer
from flexalign.models.sources import resolve

Base: TypeAlias = str | Path | PreTrainedModel
"""A known name, a folder, or a loaded model."""


class BasedModel(FusedDecoding, nn.Module):
    """One model with a dial. Attributes that this class does not have are the base's.

    Attributes:
        base: The base model, a causal language model of transformers.
        tokenizer: The base's tokenizer; None if it is not known.
    """

    base: PreTrainedModel

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Keep a base."""
        super().__init__()
        self.base = base
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # not set yet, as in `__init__` or during a copy
                raise
            return getattr(self.base, name)

    def set_checkpointing(self, method: str, *args: Any, **options: Any) -> None:
        """Switch activation checkpointing of the base."""
        getattr(self.base, method)(*args, **options)

    def sweep(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lams: Sequence[Any] | Tensor,
        **options: Any,
    ) -> Any:
        """Generate from every prompt at several λ, as one batch.

        Where the cache does not depend on λ, each prompt is prefilled once for all λ.

        Args:
            input_ids: Prompts, shape ``(B, T)``, left padded.
            attention_mask: Shape ``(B, T)``.
            lams: The n settings, each as ``generate`` takes it as ``lam``.
            **options: As in ``generate``.

        Returns:
            As ``generate``, with ``B·n`` rows: prompt 0 at every λ, then prompt 1, and so on.

        Raises:
            LambdaError: If there is no λ, or one is not finite.
            ConfigError: If an option is not available here.
        """
        settings = _sweep_dials(lams, options)
        repeats = len(settings)
        dials = RowDials.following(settings * len(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask

        self._prefill_sweep(input_ids, mask, dials, options)
        own = {name: options[name] for name in self.row_inputs if name in options}
        options |= {name: value.repeat_interleave(repeats, 0) for name, value in own.items()}
        return self.generate(
            input_ids=input_ids.repeat_interleave(repeats, 0),
            attention_mask=mask.repeat_interleave(repeats, 0),
            lam=dials,
            **options,
        )

    def _prefill_sweep(
        self, input_ids: Tensor, mask: Tensor, dials: RowDials, options: dict[str, Any]
    ) -> None:
        """Put a cache of the prompts into the options, in place, if one serves several λ.

        Args:
            input_ids: Prompts, shape ``(B, T)``.
            mask: Shape ``(B, T)``.
            dials: The dials of all ``B·n`` rows.
            options: The options of ``generate``.
        """

    @property
    def _leader(self) -> PreTrainedModel:
        return self.base

    def _checked_lambda(self, lam: Any) -> Lambda:
        lam = self._default_dial() if lam is None else lam
        return as_lambda(torch.tensor(lam) if isinstance(lam, list | tuple) else lam)


class AdaptedModel(BasedModel):
    """A base model with a trained dial.

    Attributes:
        dial_config: The dial's settings.
    """

    dial_config: DialConfig

    def __init__(
        self,
        base: PreTrainedModel,
        dial_config: DialConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Join a base and the settings of its dial."""
        super().__init__(base, tokenizer)
        self.dial_config = dial_config
        self._has_warned = False

    @property
    def thinking_tags(self) -> ThinkingTags | None:
        """The dial's thinking tags; None if the tokenizer's are used."""
        return self.dial_config.tags

    def threshold(self, policy: Adaptive) -> float:
        """Return a policy's threshold. If it sets none, the calibrated one, if there is one."""
        return self.dial_config.threshold(policy)

    def _default_dial(self) -> float:
        return self.dial_config.default_lambda

    def _checked_lambda(self, lam: Any) -> Lambda:
        checked = super()._checked_lambda(lam)
        if not self._has_warned:
            values = torch.as_tensor(checked).detach()
            self._note_range(float(values.min()), float(values.max()))
        return checked

    def _note_range(self, least: float, largest: float) -> None:
        """Warn, once, if λ is outside the dial's range."""
        tried = self.dial_config.lambda_range
        low, high = tried
        only_ends = isinstance(tried, OnlyEnds)
        inside = {least, largest} <= set(tried) if only_ends else low <= least and largest <= high
        if self._has_warned or inside:
            return

        self._has_warned = True
        named = f"λ = {least:g}" if least == largest else f"λ from {least:g} to {largest:g}"
        asked = f"{named} leaves this adapter's range"
        warnings.warn(
            f"{asked}, which is λ = {low:g} and {high:g} alone: it is a plain LoRA, trained at one "
            "strength; results at other λ are unmeasured."
            if only_ends
            else f"{asked} [{low:g}, {high:g}], where it was tried; results outside it are "
            "unmeasured.",
            stacklevel=3,
        )


def _sweep_dials(lams: Sequence[Any] | Tensor, options: dict[str, Any]) -> list[Dial]:
    """Parse the settings of a sweep.

    Raises:
        LambdaError: If there is no λ, or one is not finite.
        ConfigError: If the caller gives a cache.
    """
    given = lams.tolist() if isinstance(lams, Tensor) else list(lams)
    settings = read_dials(given, len(given))
    if not settings:
        raise LambdaError("a sweep needs at least one λ.")
    if options.get("past_key_values") is not None:
        raise ConfigError("a sweep fills a cache of its own; leave past_key_values out.")
    return settings


def load_base(
    base: Base, loading: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """Return a base model, its tokenizer where there is one, and its name.

    Args:
        base: A known name, a folder, or a loaded model.
        loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

    Raises:
        UnsupportedModelError: If it has a PEFT adapter already.
    """
    model: Any = base
    tokenizer, source = None, ""
    if not isinstance(base, nn.Module):
        source = str(base)
        model = load_model(base, **loading)
        try:
            tokenizer = load_tokenizer(base)
        except ConfigError:
            tokenizer = None

    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            "the base has a PEFT adapter already, which would be in it at every λ; merge it first "
            "(merge_and_unload) and give the merged model."
        )
    return model, tokenizer, source or model.config._name_or_path or model_name(model)


def load_own_base(
    base: Base, settings: DialConfig, folder: Path, *, any_base: bool, loading: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the base of a dial, and check that it is the one that the dial was made for.

    Args:
        base: A known name, a folder, or a loaded model.
        settings: The dial's settings.
        folder: The dial's folder, for messages.
        any_base: Accept another base.
        loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

    Returns:
        The base, and its tokenizer where there is one, which renders prompts as in training.

    Raises:
        PairMismatchError: If the dial was made for another base.
    """
    # A folder's fingerprint can be read without loading the weights; that of GGUF cannot.
    is_checked = any_base or not settings.base_fingerprint
    from_folder = not isinstance(base, nn.Module) and resolve(base).gguf_file is None
    if from_folder and not is_checked:
        require_base(settings, fingerprint(base), str(base), folder)
    model, tokenizer, source = load_base(base, loading)
    if not from_folder and not is_checked:
        require_base(settings, fingerprint(model), source, folder)

    if tokenizer is not None:
        settings.bind(tokenizer)
    return model, tokenizer


def model_name(model: Any) -> str:
    """Return a model's class and family, for messages."""
    return f"{type(model).__name__} (family {model.config.model_type})"
