"""The batch: sequences that join and leave between two steps, and the model that runs them.

A :class:`Batch` has the sequences, left padded to one width, with their cache and its mask. Everything
that depends on the model is done by a :class:`Runner`. There is one for each kind of model: they differ
only in their caches, and one of them runs two prompts of each sequence. Their forward is that of the
library and of transformers.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, cat, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from flexalign.errors import UnsupportedModelError
from flexalign.generation.fused import forward_inputs, positions_of, taken_inputs
from flexalign.generation.interface import Phase
from flexalign.generation.row_lambdas import RowDials
from flexalign.generation.stream_cache import StreamCache
from flexalign.generation.two_model import PairCache, TwoModelDecoder
from flexalign.generation.two_streams import TwoStreamModel
from flexalign.lora_dial import LoRADial


class Runner(Protocol):
    """What a batch and a scheduler need of a model.

    The type of a cache depends on the runner; its rows are in the order of the batch.

    Attributes:
        model: The module.
        prompts: Number of prompts of a sequence. If it is 2, ids, masks, tokens and positions have
            an axis for the two after the rows: ``(B, 2, T)``.
        reads_at_lambda: Whether what a token leaves in the cache depends on λ.
    """

    model: Any
    prompts: int
    reads_at_lambda: bool

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> Any:
        """Run prompts, ``(B, T)`` left padded, and return a cache for all phases."""

    def fork(self, cache: Any, rows: Tensor, dials: RowDials) -> Any:
        """Return a copy of some rows of a cache, with the streams that their dials need."""

    def copy(self, cache: Any, rows: Tensor) -> Any:
        """Return a copy of some rows of the batch's cache, each in all its streams."""

    def take(self, cache: Any, rows: Tensor) -> None:
        """Keep some rows of a cache."""

    def reframe(self, cache: Any, width: int) -> None:
        """Bring a cache to a width: padding is added before its tokens, or removed there."""

    def append(self, cache: Any, other: Any) -> None:
        """Append the rows of another cache of the same width to this one."""

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: Any) -> Any:
        """Run one token per row and return the logits of the next, ``(B, V)``.

        Args:
            tokens: Shape ``(B, 1)``.
            mask: Shape ``(B, T_cached + 1)``.
            positions: Shape ``(B, 1)``.
            lam: Shape ``(B,)``; checked against the permitted range before.
            cache: The rows' cache, to which the tokens are added.
        """


class BatchMember(Protocol):
    """What a batch needs of a sequence.

    Attributes:
        next_token: The token that goes into the model next; of two prompts whose last tokens differ,
            one for each.
    """

    next_token: int | tuple[int, ...]

    def lam(self) -> float:
        """Return λ of the token that is chosen next."""


_Member = TypeVar("_Member", bound=BatchMember)


class Batch(Generic[_Member]):
    """Sequences, their cache, and its mask, which marks where each of them begins.

    Attributes:
        sequences: In the order of the cache's rows.
    """

    def __init__(self, runner: Runner) -> None:
        """Create an empty batch for a model."""
        self.sequences: list[_Member] = []
        self._runner = runner
        self._device = runner.model.device
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def add(self, sequences: Sequence[_Member], cache: Any, mask: Tensor) -> None:
        """Add sequences.

        Args:
            sequences: At least one.
            cache: Their cache, of width ``mask.shape[1]``. The batch owns and changes it from now.
            mask: Shape ``(len(sequences), T)``, left padded.
        """
        width = max(self._mask.shape[-1], _needed_width(mask))
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
        """Keep the sequences at these places, and remove padding that none of them needs."""
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

    def copy_row(self, place: int) -> tuple[Any, Tensor]:
        """Return a copy of the cache of the sequence at a place, and its mask, for :meth:`add`."""
        row = torch.tensor([place], device=self._device)
        return self._runner.copy(self._cache, row), self._mask[row]

    def clear(self) -> None:
        """Remove all sequences."""
        self.sequences = []
        self._cache = None
        self._mask = torch.zeros((0, 0), dtype=torch.long)

    def step(self) -> Tensor:
        """Run the next token of every sequence; return the logits after it, ``(B, V)``, in float32."""
        tokens = next_tokens([one.next_token for one in self.sequences], self._runner.prompts)
        tokens = tokens.to(self._device)
        lam = torch.tensor([one.lam() for one in self.sequences], dtype=torch.float64)
        # Padding has no position: a token's is the number of real tokens before it.
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        logits: Tensor = self._runner.step(tokens, self._mask, positions, lam, self._cache)
        return logits.float()


def next_tokens(tokens: Sequence[int | tuple[int, ...]], prompts: int) -> Tensor:
    """Return the next token of each row, ``(B, 1)``; of two prompts for each, ``(B, 2, 1)``."""
    if prompts == 1:
        return torch.tensor(tokens)[:, None]
    both = [token if isinstance(token, tuple) else (token,) * prompts for token in tokens]
    return torch.tensor(both)[:, :, None]


def _needed_width(mask: Tensor) -> int:
    """Return the length of the longest row; at least 1, as a cache cannot have width 0."""
    return max(1, int(mask.sum(-1).amax()))


def _padded(mask: Tensor, width: int) -> Tensor:
    """Bring a mask to a width on the left; negative padding removes columns."""
    return nn.functional.pad(mask, (width - mask.shape[-1], 0))


class InRaRunner:
    """Runs an InRa model: two streams of one module; each row runs in the streams its dial needs."""

    prompts = 1
    reads_at_lambda = False
    model: TwoStreamModel

    def __init__(self, model: TwoStreamModel, gate: float | None = None) -> None:
        """Serve a model; ``gate`` is that of :func:`flexalign.fusion.fuse`."""
        self.model = model
        self._gate = gate

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> StreamCache:
        """Run prompts through the streams that the phases need."""
        return self.model.prefill_phases(ids, mask, phases)

    def fork(self, cache: StreamCache, rows: Tensor, dials: RowDials) -> StreamCache:
        """Return a copy of rows, with the streams that these dials need."""
        return self.model.fork_cache(cache, rows, dials)

    def copy(self, cache: StreamCache, rows: Tensor) -> StreamCache:
        """Return a copy of some rows, each in its streams."""
        rows = rows.cpu()
        return cache.fork(rows, cache.require_plan().streams[rows])

    def take(self, cache: StreamCache, rows: Tensor) -> None:
        """Keep some rows, each in its streams."""
        cache.take(rows)

    def reframe(self, cache: StreamCache, width: int) -> None:
        """Bring both streams to a width."""
        reframe(cache.layers, width)

    def append(self, cache: StreamCache, other: StreamCache) -> None:
        """Append other rows, each in its streams."""
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


class TwoPromptRunner(InRaRunner):
    """Runs one model under two prompts: the streams of each row are its prompts."""

    prompts = 2

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> StreamCache:
        """Run prompts, ``(B, 2, T)``, through the streams that the phases need."""
        second = {"aligned_ids": ids[:, 1], "aligned_mask": mask[:, 1]}
        return self.model.prefill_phases(ids[:, 0], mask[:, 0], phases, **second)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: StreamCache
    ) -> Tensor:
        """Run one token per row and prompt, ``(B, 2, 1)``, and fuse them."""
        output = self.model(
            tokens[:, 0],
            mask[:, 0],
            positions[:, 0],
            cache,
            aligned_ids=tokens[:, 1],
            aligned_mask=mask[:, 1],
            aligned_positions=positions[:, 1],
            lam=lam,
            gate=self._gate,
            lam_checked=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class PairRunner:
    """Runs the two models of a pair. Both run every row, as some row of a batch may need either."""

    prompts = 1
    reads_at_lambda = False

    def __init__(self, model: TwoModelDecoder, gate: float | None = None) -> None:
        """Serve a pair; ``gate`` is that of :func:`flexalign.fusion.fuse`.

        Raises:
            UnsupportedModelError: If a layer of either caches anything but keys and values.
        """
        self.model = model
        self._gate = gate
        for side in (model.reference, model.aligned):
            _new_cache(side.config)

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> PairCache:
        """Run prompts through both models."""
        cache = PairCache(_new_cache(self.model.reference.config))
        cache.aligned = _new_cache(self.model.aligned.config)
        # λ can be any number here: the logits of a prefill are not used.
        self._forward(ids, mask, positions_of(mask), torch.ones(len(ids)), cache)
        return cache

    def fork(self, cache: PairCache, rows: Tensor, dials: RowDials) -> PairCache:
        """Return a copy of rows of both caches."""
        return self.copy(cache, rows)

    def copy(self, cache: PairCache, rows: Tensor) -> PairCache:
        """Return a copy of some rows of both caches."""
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
        """Append other rows, in both caches."""
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

    prompts = 1
    reads_at_lambda = False

    def __init__(self, model: Any) -> None:
        """Serve a model.

        Raises:
            UnsupportedModelError: If a layer caches anything but keys and values.
        """
        self.model = model
        self._takes = forward_inputs(model)
        _new_cache(model.config)

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> DynamicCache:
        """Run prompts; the phases are not used, as there is no dial."""
        cache = _new_cache(self.model.config)
        self._forward(ids, mask, positions_of(mask), cache)
        return cache

    def fork(self, cache: DynamicCache, rows: Tensor, dials: RowDials) -> DynamicCache:
        """Return a copy of rows."""
        return self.copy(cache, rows)

    def copy(self, cache: DynamicCache, rows: Tensor) -> DynamicCache:
        """Return a copy of some rows."""
        copied: DynamicCache = _forked(cache, rows)
        return copied

    def take(self, cache: DynamicCache, rows: Tensor) -> None:
        """Keep some rows."""
        cache.batch_select_indices(rows)

    def reframe(self, cache: DynamicCache, width: int) -> None:
        """Bring the cache to a width."""
        reframe(cache.layers, width)

    def append(self, cache: DynamicCache, other: DynamicCache) -> None:
        """Append other rows."""
        append_rows(cache.layers, other.layers)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Run one token per row; λ is not used."""
        return self._forward(tokens, mask, positions, cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **taken_inputs(optional, self._takes),
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class LoRARunner(PlainRunner):
    """Runs a LoRA dial: one stream and one cache; each row's tokens are read at its own λ."""

    reads_at_lambda = True
    model: LoRADial

    def prefill(self, ids: Tensor, mask: Tensor, phases: Sequence[Phase]) -> Any:
        """Run prompts once for each λ that the phases begin at."""
        return self.model.prefill_phases(ids, mask, phases)

    def fork(self, cache: Any, rows: Tensor, dials: RowDials) -> Any:
        """Return a copy of rows, each as its λ made it."""
        return self.model.fork_cache(cache, rows, dials)

    def step(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, lam: Tensor, cache: Any
    ) -> Tensor:
        """Run one token per row, each at its λ."""
        output = self.model(
            tokens, mask, positions, cache, logits_to_keep=1, lam=lam, lam_checked=True
        )
        logits: Tensor = output.logits[:, -1]
        return logits


# Caches of transformers: copying rows, appending rows, changing the width.


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
    # Shallow copies suffice: selecting rows makes new tensors and leaves the original's unchanged.
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_select_indices(rows.to(own.layers[0].keys.device))
    return own


def reframe(layers: Iterable[Any], width: int) -> None:
    """Bring cache layers to a width, on the left: padding is added before the tokens, or removed.

    The attention mask hides the padding, in every layer alike.

    Args:
        layers: The layers of transformers' dynamic cache, with or without sliding windows.
        width: The number of tokens that each layer has seen afterwards.
    """
    for layer in layers:
        if not layer.is_initialized:
            continue
        kept = width
        if layer.is_sliding:
            # A window keeps only the last tokens, and counts all that it has seen.
            kept = min(width, layer.sliding_window - 1)
            layer.cumulative_length = width
        layer.keys, layer.values = (
            _with_width(tensor, kept) for tensor in (layer.keys, layer.values)
        )


def append_rows(layers: Iterable[Any], others: Iterable[Any]) -> None:
    """Append the rows of other layers, of the same width, to these."""
    for layer, other in zip(layers, others, strict=True):
        layer.keys = cat([layer.keys, other.keys])
        layer.values = cat([layer.values, other.values])


def _with_width(tensor: Any, width: int) -> Any:
    have = tensor.shape[-2]
    if width <= have:
        return tensor[..., have - width :, :]
    return nn.functional.pad(tensor, (0, 0, width - have, 0))
