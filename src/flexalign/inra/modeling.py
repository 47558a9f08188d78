"""The InRa model: a base model, an adapter before its layer 0, and λ between the two streams."""

import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexalign._modes import evaluating
from flexalign.errors import UnsupportedModelError
from flexalign.generation.adapted import (
    AdaptedModel,
    Base,
    load_base,
    load_own_base,
    model_name,
)
from flexalign.generation.fused import positions_of
from flexalign.generation.probing import distance_beyond_rounding, perturbed
from flexalign.generation.row_lambdas import RowDials
from flexalign.generation.stream_cache import FIRST, SECOND, StackPlan, StreamCache
from flexalign.generation.two_streams import TwoStreamModel
from flexalign.inra.adapter import (
    AdapterHook,
    copy_first_layer,
    decoder_layers,
    identity_adapter,
    refusing,
)
from flexalign.inra.configuration import (
    InRaConfig,
    check_folder,
    load_weights,
    save_adapter,
)
from flexalign.models.loading import fingerprint
from flexalign.models.sources import resolve_adapter

BASE, ADAPTER = FIRST, SECOND
"""The streams of an InRa model, as :class:`flexalign.generation.stream_cache.StackPlan` counts them."""


class InRaModel(AdaptedModel, TwoStreamModel):
    """A base model, a layer adapter before its layer 0, and a λ between the two streams.

    The base stream is the base model; the adapter stream is the base model with the adapter's
    layers in front. ``forward`` returns ``λ·adapter + (1−λ)·base`` of their logits (equation 5).
    The base is frozen, and can still be used alone. Attributes that this class does not have
    (``config``, ``device``, …) are the base's.

    Example:
        >>> model = InRaModel.create("miniature")                             # doctest: +SKIP
        >>> model.generate(**tokenizer(prompts), lam=[0.0, 0.5, 1.0])         # doctest: +SKIP

    Attributes:
        base: The base model, a causal language model of transformers.
        adapter: The adapter's layers.
        head: The base's head.
        adapter_hook: The hook that runs the adapter stream's rows through the adapter.
        inra_config: The adapter's settings; the same as ``dial_config``.
        tokenizer: The base's tokenizer; None if it is not known.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: nn.ModuleList,
        inra_config: InRaConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Join a base and its adapter. Use :meth:`create` or :meth:`from_pretrained` instead.

        Raises:
            UnsupportedModelError: If the base has no plain head, has recurrent layers, or its
                streams cannot run as one batch.
        """
        super().__init__(base, inra_config, tokenizer)
        name = model_name(base)
        self.adapter = adapter

        self.adapter_hook = AdapterHook(decoder_layers(base, name)[0], adapter)
        weakref.finalize(self, self.adapter_hook.handle.remove)

        self.new_cache()  # raises if a layer caches anything other than keys and values
        probe_streams(self, name)
        base.requires_grad_(False)  # last, so that a refused base is not changed

    @classmethod
    def create(cls, base: Base, *, adapter_layers: int = 1, **loading: Any) -> "InRaModel":
        """Put a new adapter before a base model. It is the identity, so each λ gives the base.

        Args:
            base: A known name, a folder, or a loaded model.
            adapter_layers: Number of layers; the paper found one to be best.
            **loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

        Raises:
            UnsupportedModelError: If the base cannot have an adapter (post-LN, recurrent,
                quantised).
        """
        model, tokenizer, source = load_base(base, loading)
        settings = InRaConfig(source, fingerprint(model), adapter_layers)
        adapter = identity_adapter(model, adapter_layers, model_name(model))
        return cls(model, adapter, settings, tokenizer)

    @classmethod
    def from_pretrained(
        cls, base: Base, adapter: str | Path, *, any_base: bool = False, **loading: Any
    ) -> "InRaModel":
        """Load an adapter's folder onto its base.

        Args:
            base: A known name, a folder, or a loaded model.
            adapter: The folder that :meth:`save_pretrained` wrote, or a known name.
            any_base: Accept another base than the adapter was made for, if the shapes fit.
            **loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

        Raises:
            CheckpointError: If the adapter's files are missing, truncated or corrupt.
            PairMismatchError: If the adapter was made for another base.
        """
        folder = resolve_adapter(adapter)
        settings = check_folder(folder)

        model, tokenizer = load_own_base(base, settings, folder, any_base=any_base, loading=loading)
        layers = copy_first_layer(model, settings.adapter_layers, model_name(model))
        load_weights(layers, folder)
        return cls(model, layers, settings, tokenizer)

    @property
    def inra_config(self) -> InRaConfig:
        """The adapter's settings."""
        return cast("InRaConfig", self.dial_config)

    @inra_config.setter
    def inra_config(self, settings: InRaConfig) -> None:
        self.dial_config = settings

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save only the adapter: its settings and one file with its layers' weights."""
        save_adapter(self.adapter, self.inra_config, Path(folder))

    # The second stream: the base with its adapter.

    def new_cache(self) -> StreamCache:
        """Return an empty cache for both streams."""
        return StreamCache(self.base.config, len(self.adapter))

    def _running(self, plan: StackPlan) -> AbstractContextManager[None]:
        return self.adapter_hook.enabled(len(plan.rows), plan.second_start)

    def set_checkpointing(self, method: str, *args: Any, **options: Any) -> None:
        """Switch activation checkpointing of the base and of the adapter's layers."""
        super().set_checkpointing(method, *args, **options)

        # The adapter's layers are not modules of the base, so they follow its layer 0.
        first = decoder_layers(self.base, model_name(self.base))[0]
        for layer in self.adapter:
            for module, twin in zip(layer.modules(), first.modules(), strict=True):
                for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                    if hasattr(twin, name):
                        setattr(module, name, getattr(twin, name))

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        self._note_range(dials.least, dials.largest)
        return super()._decoding_inputs(dials, options)


# The test of a model's two streams when it is loaded: a few tokens are run through both streams,
# stacked and separately, and compared. A model whose results differ is refused.

_ROWS, _TOKENS, _PADDING = 2, 4, 1
"""The stack has as many rows as tokens, so that an input that is cut by tokens instead of by rows
gives a wrong result here."""

_FAILING = "its two streams cannot run as rows of one batch"
_STACKED = "its two streams disturb each other when they run as rows of one batch"
_CACHED = "its streams come out differently with a cache than without"


@torch.no_grad()
def probe_streams(model: InRaModel, name: str) -> None:
    """Check that stacked and separate streams agree, and that cached and uncached runs agree.

    Raises:
        UnsupportedModelError: If they differ by more than rounding.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, model.head.vocab_size, (_ROWS, _TOKENS), generator=generator)
    tokens = tokens.to(device)
    mask = torch.ones_like(tokens)
    mask[-1, :_PADDING] = 0

    noise = perturbed(list(model.adapter.parameters()))
    with refusing(name, _FAILING), evaluating(model), noise:
        _compare(model, tokens, mask, name)


def _compare(model: InRaModel, tokens: Tensor, mask: Tensor, name: str) -> None:
    positions = positions_of(mask)
    whole: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    base, adapter = model.stream_hidden(tokens, **whole)
    base_alone, _ = model.stream_hidden(tokens, streams=BASE, **whole)
    _, adapter_alone = model.stream_hidden(tokens, streams=ADAPTER, **whole)
    _require_equal(base, base_alone, mask, _STACKED, name)
    _require_equal(adapter, adapter_alone, mask, _STACKED, name)

    cache = model.prefill(tokens[:, :-1], mask[:, :-1])
    last: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, -1:]}
    step = model.stream_hidden(tokens[:, -1:], cache=cache, **last)
    for cached, uncached in zip(step, (base, adapter), strict=True):
        _require_equal(cached, uncached[:, -1:], mask[:, -1:], _CACHED, name)


def _require_equal(found: Tensor, expected: Tensor, mask: Tensor, problem: str, name: str) -> None:
    """Check that hidden states (B, T, H) agree where the mask (B, T) is set.

    Raises:
        UnsupportedModelError: If their relative distance is larger than rounding.
    """
    kept = mask.bool()
    off = distance_beyond_rounding(found[kept], expected[kept], expected.dtype)
    if off is not None:
        raise UnsupportedModelError(
            f"{name}: {problem} (off by {off:.1%}); InRa cannot serve this model."
        )
