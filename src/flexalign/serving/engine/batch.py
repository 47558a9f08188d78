"""The batch: sequences that join and leave between two steps, and the model that runs them.

A :class:`Batch` holds the sequences, left padded to one width, with their cache and its mask. It asks a
:class:`Runner` for everything that depends on the model. An InRa model, a pair and a plain model have
one each: they differ in their caches alone, and their forward is the library's and transformers' own.
"""

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


class Runner(Protocol):
    """What a batch and a scheduler ask of a model.

    A cache is the runner's own kind of object; its rows stand in the order of the batch.

    Attributes:
        model: The module.
    """

    model: Any

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> Any:
        """Run prompts, ``(B, T)`` left padded, and return a cache for all phases."""

    def fork(self, cache: Any, rows: Tensor, dials: RowDials) -> Any:
        """Return a copy of some rows of a cache, with the streams that their dials need."""

    def take(self, cache: Any, rows: Tensor) -> None:
        """Keep some rows of a cache."""

    def reframe(self, cache: Any, width: int) -> None:
        """Bring a cache to a width: padding is put before its tokens, or cut off there."""

    def append(self, cache: Any, other: Any) -> None:
        """Put the rows of another cache of the same width behind those of this one."""

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: Any) -> Any:
        """Run one token per row and return the logits of the next, ``(B, V)``.

        Args:
            tokens: Shape ``(B, 1)``.
            mask: Shape ``(B, T_cached + 1)``.
            positions: Shape ``(B, 1)``.
            lam: Shape ``(B,)``, permitted already.
            cache: The rows' cache, to which the tokens are added.
        """


class BatchMember(Protocol):
    """What a batch asks of a sequence.

    Attributes:
        next_token: The token that goes into the model next.
    """

    next_token: int

    def lam(self) -> float:
        """Return λ of the token that will be chosen."""


_Member = TypeVar("_Member", bound=BatchMember)


class Batch(Generic[_Member]):
    """Sequences, their cache and its mask, which says where each of them begins.

    Attributes:
        sequences: In the order of the cache's rows.
    """

    def __init__(self, runner: Runner) -> None:
        """Begin with no sequence."""
        self.sequences: list[_Member] = []
        self._runner = runner
        self._device = runner.model.device
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def add(self, sequences: Sequence[_Member], cache: Any, mask: Tensor) -> None:
        """Let sequences join.

        Args:
            sequences: At least one.
            cache: Their own, of width ``mask.shape[1]``; the batch's from here on.
            mask: Shape ``(len(sequences), T)``, left padded.
        """
        width = max(self._mask.shape[1], _needed_width(mask))
        mask = _padded(mask, width)
        self._runner.reframe(cache, width)

        if self.sequences:
            self._runner.reframe(self._cache, width)
            self._runner.append(self._cache, cache)
            mask = torch.cat([_padded(self._mask, width), mask])
        else:
            self._cache = cache
        self._mask = mask
        self.sequences = [*self.sequences, *sequences]

    def keep(self, places: Sequence[int]) -> None:
        """Let all sequences but these leave, and the padding that only they needed."""
        if len(places) == len(self.sequences):
            return
        self.sequences = [self.sequences[place] for place in places]
        if not self.sequences:
            self.clear()
            return

        index = torch.tensor(places, device=self._device)
        self._runner.take(self._cache, index)
        mask = self._mask[index]
        width = _needed_width(mask)
        self._runner.reframe(self._cache, width)
        self._mask = _padded(mask, width)

    def clear(self) -> None:
        """Let all sequences leave."""
        self.sequences = []
        self._cache = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def step(self) -> Tensor:
        """Run every sequence's next token; return the logits after it, ``(B, V)``, in float32."""
        tokens = torch.tensor([[one.next_token] for one in self.sequences], device=self._device)
        lam = torch.tensor([one.lam() for one in self.sequences], dtype=torch.float64)
        # Padding has no position: a token's is the number of real tokens before it.
        positions = self._mask.sum(1, keepdim=True)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        logits: Tensor = self._runner.step(tokens, self._mask, positions, lam, self._cache)
        return logits.float()


def _needed_width(mask: Tensor) -> int:
    """Return the columns that the longest row fills; at least 1, as caches have no width 0."""
    return max(1, int(mask.sum(1).amax()))


def _padded(mask: Tensor, width: int) -> Tensor:
    """Bring a mask to a width on the left; a negative padding cuts off."""
    return nn.functional.pad(mask, (width - mask.shape[1], 0))


class InRaRunner:
    """Runs an InRa model: two streams of one module; a row is in those that its dial needs."""

    def __init__(self, model: InRaModel, gate: float | None = None) -> None:
        """Serve a model; ``gate`` is that of :func:`flexalign.fusion.fuse`."""
        self.model = model
        self._gate = gate

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> StreamCache:
        """Run prompts through the streams that any of the phases needs."""
        return self.model.prefill_phases(ids, mask, phases)

    def fork(self, cache: StreamCache, rows: Tensor, dials: RowDials) -> StreamCache:
        """Copy rows with the streams that these dials need."""
        return self.model.fork_cache(cache, rows, dials)

    def take(self, cache: StreamCache, rows: Tensor) -> None:
        """Keep some rows, in the streams that they have."""
        cache.take(rows)

    def reframe(self, cache: StreamCache, width: int) -> None:
        """Bring both streams to a width."""
        reframe(cache.layers, width)

    def append(self, cache: StreamCache, other: StreamCache) -> None:
        """Put other rows behind, each in its streams."""
        cache.append(other)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: StreamCache
    ) -> Tensor:
        """Run one token per row through its streams and fuse them."""
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
    """Runs two whole models. Both run every row, as one row of a batch may need either."""

    def __init__(self, model: TwoModelDecoder, gate: float | None = None) -> None:
        """Serve a pair; ``gate`` is that of :func:`flexalign.fusion.fuse`.

        Raises:
            UnsupportedModelError: If one of the two keeps anything but keys and values.
        """
        self.model = model
        self._gate = gate
        for side in (model.reference, model.aligned):
            _new_cache(side.config)

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> PairCache:
        """Run prompts through both models."""
        cache = PairCache(_new_cache(self.model.reference.config))
        cache.aligned = _new_cache(self.model.aligned.config)
        # λ is of no account: a prefill's logits are not used.
        self._forward(ids, mask, positions_of(mask), torch.ones(len(ids)), cache)
        return cache

    def fork(self, cache: PairCache, rows: Tensor, dials: RowDials) -> PairCache:
        """Copy rows of both caches."""
        return PairCache(*(_forked(one, rows) for one in cache.caches()))

    def take(self, cache: PairCache, rows: Tensor) -> None:
        """Keep some rows of both caches."""
        for one in cache.caches():
            one.batch_select_indices(rows)

    def reframe(self, cache: PairCache, width: int) -> None:
        """Bring both caches to a width."""
        for one in cache.caches():
            reframe(one.layers, width)

    def append(self, cache: PairCache, other: PairCache) -> None:
        """Put other rows behind, in both caches."""
        for mine, theirs in zip(cache.caches(), other.caches(), strict=True):
            append_rows(mine.layers, theirs.layers)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: PairCache
    ) -> Tensor:
        """Run one token per row through both models and fuse them."""
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
    """Runs one model without a dial."""

    def __init__(self, model: Any) -> None:
        """Serve a model.

        Raises:
            UnsupportedModelError: If it keeps anything but keys and values.
        """
        self.model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        _new_cache(model.config)

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> DynamicCache:
        """Run prompts; there is no dial to be ready for."""
        cache = _new_cache(self.model.config)
        self._forward(ids, mask, positions_of(mask), cache)
        return cache

    def fork(self, cache: DynamicCache, rows: Tensor, dials: RowDials) -> DynamicCache:
        """Copy rows."""
        return _forked(cache, rows)

    def take(self, cache: DynamicCache, rows: Tensor) -> None:
        """Keep some rows."""
        cache.batch_select_indices(rows)

    def reframe(self, cache: DynamicCache, width: int) -> None:
        """Bring the cache to a width."""
        reframe(cache.layers, width)

    def append(self, cache: DynamicCache, other: DynamicCache) -> None:
        """Put other rows behind."""
        append_rows(cache.layers, other.layers)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Run one token per row; λ says nothing here."""
        return self._forward(tokens, mask, positions, cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        # Not every family's forward knows these two.
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


# Caches of transformers: rows are copied, put one behind the other, brought to one width.


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
    # Shallow copies: selecting rows makes new tensors, so that the original keeps its own.
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_select_indices(rows.to(own.layers[0].keys.device))
    return own


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
            # A window holds its last tokens only, and counts all that it has seen.
            kept = min(width, layer.sliding_window - 1)
            layer.cumulative_length = width
        layer.keys, layer.values = (
            _with_width(tensor, kept) for tensor in (layer.keys, layer.values)
        )


def append_rows(layers: Iterable[Any], others: Iterable[Any]) -> None:
    """Put the rows of other layers, of the same width, behind those of these."""
    for layer, other in zip(layers, others, strict=True):
        layer.keys = cat([layer.keys, other.keys])
        layer.values = cat([layer.values, other.values])


def _with_width(tensor: Any, width: int) -> Any:
    have = tensor.shape[-2]
    if width <= have:
        return tensor[..., have - width :, :]
    return nn.functional.pad(tensor, (0, 0, width - have, 0))
