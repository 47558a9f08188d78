"""The batch of rows under way: left padded to one width, which they join and leave."""

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, cat, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from flexalign.errors import UnsupportedModelError
from flexalign.generation.fused import positions_of
from flexalign.generation.interface import Phase
from flexalign.generation.row_lambdas import RowDials
from flexalign.generation.two_model import PairCache, TwoModelDecoder
from flexalign.inra import InRaModel
from flexalign.inra.cache import StreamCache

# Caches whose rows come and go: brought to one width, one put behind the other.


def reframe(layers: Iterable[Any], width: int) -> None:
    """Bring cache layers to a width, on the left: padding is put before, or cut off.

    What stands in the padding is hidden by the attention mask, in every layer alike.

    Args:
        layers: Of transformers' dynamic cache, sliding windows among them.
        width: Tokens that each is to have seen.
    """
    for layer in layers:
        if not layer.is_initialized:
            continue
        kept = width
        if layer.is_sliding:
            kept = min(width, layer.sliding_window - 1)
            layer.cumulative_length = width
        layer.keys, layer.values = (
            _fitted_caches(held, kept) for held in (layer.keys, layer.values)
        )


def append_rows(layers: Iterable[Any], others: Iterable[Any]) -> None:
    """Put the rows of other layers, of the same width, behind those of these."""
    for layer, other in zip(layers, others, strict=True):
        layer.keys = cat([layer.keys, other.keys])
        layer.values = cat([layer.values, other.values])


def _fitted_caches(held: Any, width: int) -> Any:
    have = held.shape[-2]
    if width <= have:
        return held[..., have - width :, :]
    return nn.functional.pad(held, (0, 0, width - have, 0))


# What the scheduler asks of a model: prefill prompts, fork and join caches, run one step.
#
# An InRa model, a pair and a plain model differ in their caches alone; their forward is the library's
# and transformers' own.


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
        """Bring a cache to a width on the left; see :func:`flexalign.serving.engine.batch`."""

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
        return self.model.prefill_phases(ids, mask, phases)

    def fork(self, cache: StreamCache, rows: Tensor, dials: RowDials) -> StreamCache:
        """See :class:`Runner`."""
        return self.model.fork_cache(cache, rows, dials)

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
            tokens,
            mask,
            position_ids=positions,
            past_key_values=cache,
            lam=lam,
            gate=self._gate,
            lam_checked=True,
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
            ids,
            mask,
            positions,
            cache,
            lam,
            self._gate,
            use_cache=True,
            logits_to_keep=1,
            lam_checked=True,
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


class FrameRow(Protocol):
    """What a frame asks of a row: the token that goes in next, and its λ."""

    next_token: int

    def lam(self) -> float:
        """λ of the token that will be chosen."""


_Row = TypeVar("_Row", bound=FrameRow)


class Frame(Generic[_Row]):
    """Rows, their cache and its mask, which says where each row begins.

    Attributes:
        rows: In the order of the batch.
    """

    def __init__(self, runner: Runner) -> None:
        self.rows: list[_Row] = []
        self._runner = runner
        self._device = runner.model.device
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def add(self, rows: Sequence[_Row], cache: Any, mask: Tensor) -> None:
        """Let rows join.

        Args:
            rows: At least one.
            cache: Their own, of :attr:`width` ``mask.shape[1]``; the frame's from here on.
            mask: Shape ``(len(rows), T)``, left padded.
        """
        width = max(self._mask.shape[1], _needed(mask))
        mask = _fitted(mask, width)
        self._runner.reframe(cache, width)
        if self.rows:
            self._runner.reframe(self._cache, width)
            self._runner.append(self._cache, cache)
            mask = torch.cat([_fitted(self._mask, width), mask])
        else:
            self._cache = cache
        self._mask = mask
        self.rows = [*self.rows, *rows]

    def keep(self, places: Sequence[int]) -> None:
        """Let all rows but these leave, and the padding that only they needed."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        if not self.rows:
            self.clear()
            return
        index = torch.tensor(places, device=self._device)
        self._runner.take(self._cache, index)
        mask = self._mask[index]
        width = _needed(mask)
        self._runner.reframe(self._cache, width)
        self._mask = _fitted(mask, width)

    def clear(self) -> None:
        """Let everybody leave."""
        self.rows = []
        self._cache = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def step(self) -> Tensor:
        """Run every row's next token; return the logits of those after, ``(B, V)``, in float32."""
        tokens = torch.tensor([[row.next_token] for row in self.rows], device=self._device)
        lam = torch.tensor([row.lam() for row in self.rows], dtype=torch.float64)
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        logits: Tensor = self._runner.step(tokens, self._mask, positions, lam, self._cache)
        return logits.float()


def _needed(mask: Tensor) -> int:
    """Return the columns that the longest row fills; one at least, as caches have no width 0."""
    return max(1, int(mask.sum(1).amax()))


def _fitted(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
