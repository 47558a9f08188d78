"""What the scheduler asks of a model: prefill prompts, fork and join caches, run one step.

An InRa model, a pair and a plain model differ in their caches alone; their forward is the library's
and transformers' own.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from flexalign.decoding.dials import RowDials
from flexalign.decoding.fused import positions_of
from flexalign.decoding.two_model import PairCache, TwoModelDecoder
from flexalign.errors import UnsupportedModelError
from flexalign.inra import InRaModel
from flexalign.inra.kv import StreamCache
from flexalign.serving.engine.caches import append_rows, reframe

__all__ = ["InRaRunner", "PairRunner", "PlainRunner", "Runner"]

Phase = tuple[Tensor, RowDials]
"""Rows of a prefill, and the dials that they will follow."""


class Runner(Protocol):
    """A model that decodes a batch of rows.

    Attributes:
        model: The module.
    """

    model: Any

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> Any:
        """Run prompts, ``(B, T)`` left padded, and return a cache for all phases."""

    def fork(self, cache: Any, rows: Tensor, dials: RowDials) -> Any:
        """Return a cache of its own for rows of another one: what their dials need."""

    def take(self, cache: Any, rows: Tensor) -> None:
        """Keep some rows of a cache."""

    def reframe(self, cache: Any, width: int) -> None:
        """Bring a cache to a width on the left; see :func:`flexalign.serving.engine.caches`."""

    def append(self, cache: Any, other: Any) -> None:
        """Put the rows of another cache of the same width behind those of this one."""

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: Any) -> Any:
        """Run one token per row and return the logits of the next, ``(B, V)``.

        Args:
            tokens: Shape ``(B, 1)``.
            mask: Shape ``(B, T_cached + 1)``.
            positions: Shape ``(B, 1)``.
            lam: Shape ``(B,)``.
            cache: The rows' cache, which takes the tokens in.
        """


class InRaRunner:
    """Two streams of one model; a row travels by those that its dial needs."""

    def __init__(self, model: InRaModel, gate: float | None = None) -> None:
        self.model = model
        self._gate = gate

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> StreamCache:
        """See :class:`Runner`."""
        return self.model._prefill_for(ids, mask, phases)

    def fork(self, cache: StreamCache, rows: Tensor, dials: RowDials) -> StreamCache:
        """See :class:`Runner`."""
        return self.model._fork(cache, rows, dials)

    def take(self, cache: StreamCache, rows: Tensor) -> None:
        """See :class:`Runner`."""
        cache.take(rows)

    def reframe(self, cache: StreamCache, width: int) -> None:
        """See :class:`Runner`."""
        reframe(cache.layers, width)

    def append(self, cache: StreamCache, other: StreamCache) -> None:
        """See :class:`Runner`."""
        cache.append(other)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: StreamCache
    ) -> Tensor:
        """See :class:`Runner`."""
        output = self.model(
            tokens, mask, position_ids=positions, past_key_values=cache, lam=lam, gate=self._gate
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class PairRunner:
    """Two whole models. Both take every row in, as another row may need the other one."""

    def __init__(self, model: TwoModelDecoder, gate: float | None = None) -> None:
        """Serve a pair.

        Raises:
            UnsupportedModelError: If one of the two keeps anything but keys and values.
        """
        self.model = model
        self._gate = gate
        for side in (model.reference, model.aligned):
            _new_cache(side.config)

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> PairCache:
        """See :class:`Runner`."""
        cache = PairCache(_new_cache(self.model.reference.config))
        cache.aligned = _new_cache(self.model.aligned.config)
        self._forward(ids, mask, positions_of(mask), torch.ones(len(ids)), cache)
        return cache

    def fork(self, cache: PairCache, rows: Tensor, dials: RowDials) -> PairCache:
        """See :class:`Runner`."""
        return PairCache(*(_forked(one, rows) for one in cache.caches()))

    def take(self, cache: PairCache, rows: Tensor) -> None:
        """See :class:`Runner`."""
        for one in cache.caches():
            one.batch_select_indices(rows)

    def reframe(self, cache: PairCache, width: int) -> None:
        """See :class:`Runner`."""
        for one in cache.caches():
            reframe(one.layers, width)

    def append(self, cache: PairCache, other: PairCache) -> None:
        """See :class:`Runner`."""
        for mine, theirs in zip(cache.caches(), other.caches(), strict=True):
            append_rows(mine.layers, theirs.layers)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: PairCache
    ) -> Tensor:
        """See :class:`Runner`."""
        return self._forward(tokens, mask, positions, lam, cache)

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: PairCache
    ) -> Tensor:
        output = self.model(
            ids, mask, positions, cache, lam, self._gate, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class PlainRunner:
    """One model without a dial."""

    def __init__(self, model: Any) -> None:
        """Serve a model.

        Raises:
            UnsupportedModelError: If it keeps anything but keys and values.
        """
        self.model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        _new_cache(model.config)

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> DynamicCache:
        """See :class:`Runner`."""
        cache = _new_cache(self.model.config)
        self._forward(ids, mask, positions_of(mask), cache)
        return cache

    def fork(self, cache: DynamicCache, rows: Tensor, dials: RowDials) -> DynamicCache:
        """See :class:`Runner`."""
        return _forked(cache, rows)

    def take(self, cache: DynamicCache, rows: Tensor) -> None:
        """See :class:`Runner`."""
        cache.batch_select_indices(rows)

    def reframe(self, cache: DynamicCache, width: int) -> None:
        """See :class:`Runner`."""
        reframe(cache.layers, width)

    def append(self, cache: DynamicCache, other: DynamicCache) -> None:
        """See :class:`Runner`."""
        append_rows(cache.layers, other.layers)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: DynamicCache
    ) -> Tensor:
        """See :class:`Runner`."""
        return self._forward(tokens, mask, positions, cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in optional.items() if name in self._takes}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _new_cache(config: Any) -> Any:
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or isinstance(layer, LinearAttentionLayer):
            raise UnsupportedModelError(
                f"this {config.model_type} keeps a {type(layer).__name__}; the local engine serves "
                "models whose layers all cache keys and values (no recurrent ones)."
            )
    return cache


def _forked(cache: Any, rows: Tensor) -> Any:
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_select_indices(rows.to(own.layers[0].keys.device))
    return own
