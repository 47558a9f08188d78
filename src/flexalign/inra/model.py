"""A model with a dial: two streams through one set of weights, fused by equation 5."""

import warnings
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from flexalign.data.thinking import ThinkingTags
from flexalign.decoding.dials import RowDials
from flexalign.errors import ConfigError, UnsupportedModelError
from flexalign.fusion import Lambda, as_lambda
from flexalign.inra.adapter import copy_first_layer, identity_adapter
from flexalign.inra.config import InRaConfig
from flexalign.inra.decoding import StreamDecoding
from flexalign.inra.folder import check_folder, load_weights, require_base, save_adapter
from flexalign.inra.kv import StreamCache
from flexalign.inra.probe import probe_streams
from flexalign.inra.stacked import needed_streams
from flexalign.inra.streams import BOTH
from flexalign.loading import fingerprint, load_model, load_tokenizer, resolve, resolve_adapter
from flexalign.policies import Adaptive

__all__ = ["InRaModel"]

Base: TypeAlias = str | Path | PreTrainedModel
"""A known name, a folder, or a loaded model."""


class InRaModel(StreamDecoding):
    """A base model, a layer adapter before its layer 0, and a λ between the two streams.

    The base stream is the base model; the adapter stream is the base model with the adapter's
    layers in front. ``forward`` returns ``λ·adapter + (1−λ)·base`` of their logits (equation 5).
    The base is frozen, stays usable by itself, and whatever is not found here (``config``,
    ``device``, …) is the base's.

    Example:
        >>> model = InRaModel.create("miniature")                             # doctest: +SKIP
        >>> model.generate(**tokenizer(prompts), lam=[0.0, 0.5, 1.0])         # doctest: +SKIP

    Attributes:
        base: The base model, a causal language model of transformers.
        adapter: The adapter's layers.
        head: The base's head.
        inra_config: The adapter's settings.
        tokenizer: The base's tokenizer where it is known, else None.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: nn.ModuleList,
        inra_config: InRaConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Join a base and an adapter made for it; see :meth:`create` and :meth:`from_pretrained`.

        Raises:
            UnsupportedModelError: If the base's streams cannot run as one batch.
        """
        name = _name(base)
        super().__init__(base, adapter, name)
        self.inra_config = inra_config
        self.tokenizer = tokenizer
        self._has_warned = False
        probe_streams(self, name)
        base.requires_grad_(False)  # last: a base that is refused is left as it was

    @classmethod
    def create(cls, base: Base, *, adapter_layers: int = 1, **loading: Any) -> "InRaModel":
        """Put a fresh adapter, the identity, before a base model: every λ is the base.

        Args:
            base: A known name, a folder, or a loaded model.
            adapter_layers: Number of layers; the paper found one to be best.
            **loading: For a base that is to be loaded, as in ``flexalign.loading.load_model``.

        Raises:
            UnsupportedModelError: If the base cannot have one (post-LN, recurrent, quantised).
        """
        model, tokenizer, source = _loaded(base, loading)
        settings = InRaConfig(source, fingerprint(model), adapter_layers)
        adapter = identity_adapter(model, adapter_layers, _name(model))
        return cls(model, adapter, settings, tokenizer)

    @classmethod
    def from_pretrained(
        cls, base: Base, adapter: str | Path, *, any_base: bool = False, **loading: Any
    ) -> "InRaModel":
        """Load an adapter's folder onto its base.

        Args:
            base: A known name, a folder, or a loaded model.
            adapter: The folder that :meth:`save_pretrained` wrote, or a known name.
            any_base: Take another base than the adapter was made for, if the shapes fit.
            **loading: For a base that is to be loaded, as in ``flexalign.loading.load_model``.

        Raises:
            CheckpointError: If the adapter's files are missing, truncated or corrupt.
            PairMismatchError: If the adapter was made for another base.
        """
        folder = resolve_adapter(adapter)
        settings = check_folder(folder)
        from_folder = not isinstance(base, PreTrainedModel) and resolve(base).gguf_file is None
        if from_folder and not any_base:
            require_base(settings, fingerprint(base), str(base), folder)
        model, tokenizer, source = _loaded(base, loading)
        if not from_folder and not any_base:
            require_base(settings, fingerprint(model), source, folder)
        layers = copy_first_layer(model, settings.adapter_layers, _name(model))
        load_weights(layers, folder)
        return cls(model, layers, settings, tokenizer)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save the adapter alone: its settings and one file with its layers' weights."""
        save_adapter(self.adapter, self.inra_config, Path(folder))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StreamCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        lam: Any = None,
        gate: float | None = None,
        streams: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the fused logits of a batch.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, T_cached + T)`` with a cache.
            position_ids: As the base takes them.
            past_key_values: Of ``new_cache()``, or of an earlier call.
            inputs_embeds: Embeddings in the place of ``input_ids``, shape ``(B, T, H)``.
            use_cache: Keep keys and values; by default only if a cache is given.
            logits_to_keep: As in transformers: the last so many positions, or which; 0 for all.
            lam: A number, a list, ``(B,)`` or ``(B, T)``; the adapter's default if not given.
            gate: As in :func:`flexalign.fusion.fuse`.
            streams: Per row the streams that it will need for the whole sequence, for a cache's
                first use: BASE, ADAPTER or BOTH of ``flexalign.inra.streams``; both if not given.
            **kwargs: Whatever else the base's decoder takes.

        Returns:
            ``logits`` of shape ``(B, T, V)``, or ``(B, kept, V)``, and ``past_key_values``.

        Raises:
            LambdaError: If λ is not finite or does not fit the batch.
            ConfigError: If the cache does not hold a stream that λ needs.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ConfigError("forward needs input_ids or inputs_embeds.")
        lam = self._lambda(lam)
        needed = needed_streams(lam, len(given))
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        if streams is None:
            streams = needed if cache is None else torch.full_like(needed, BOTH)
        plan = self._plan(streams, given, cache)
        if not plan.has(needed):
            raise ConfigError(
                "the cache does not hold a stream that this λ needs; generate catches up where it "
                "is given the whole sequence along with the cache."
            )
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        kwargs |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        hidden = self._run(plan, cache, kwargs)
        kept: Any = logits_to_keep
        kept = slice(-kept, None) if isinstance(kept, int) else kept
        if isinstance(lam, Tensor) and lam.ndim == 2 and lam.shape[1] == hidden.shape[1]:
            lam = lam.to(hidden.device)[:, kept]
        logits = self._fused_logits(plan, hidden[:, kept], lam, gate)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    @property
    def _leader(self) -> PreTrainedModel:
        return self.base

    def _default_dial(self) -> float:
        return self.inra_config.default_lambda

    def _thinking_tags(self) -> ThinkingTags | None:
        return self.inra_config.tags

    def threshold(self, policy: Adaptive) -> float:
        """Return a policy's threshold; the calibrated one, where there is one, if it has none."""
        return self.inra_config.threshold(policy)

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        self._note_range(dials.least, dials.largest)
        return super()._decoding_inputs(dials, options)

    def _lambda(self, lam: Any) -> Lambda:
        if lam is None:
            lam = self.inra_config.default_lambda
        checked = as_lambda(torch.tensor(lam) if isinstance(lam, list | tuple) else lam)
        if not self._has_warned:
            values = torch.as_tensor(checked).detach()
            self._note_range(float(values.min()), float(values.max()))
        return checked

    def _note_range(self, least: float, largest: float) -> None:
        low, high = self.inra_config.lambda_range
        if self._has_warned or (low <= least and largest <= high):
            return
        self._has_warned = True
        warnings.warn(
            f"λ from {least:g} to {largest:g} leaves this adapter's range [{low:g}, {high:g}], "
            "where it was tried; results outside it are unmeasured.",
            stacklevel=3,
        )


def _name(model: Any) -> str:
    return f"{type(model).__name__} (family {model.config.model_type})"


def _loaded(
    base: Base, loading: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """Return a base model, its tokenizer where there is one, and its name."""
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
            "the base has a PEFT adapter, which would be in both streams; merge it first "
            "(merge_and_unload) and give the merged model."
        )
    return model, tokenizer, source or model.config._name_or_path or _name(model)
