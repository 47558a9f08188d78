"""The cache of two streams of one model, and the stacking of their rows in one batch.

Each stream has an end of λ: the first is λ = 0, the second λ = 1. Of an InRa model the first is the
base and the second the base with its adapter; of one model under two prompts they are the prompts.
As rows of one batch they take one pass, which reads each weight once. A :class:`StackPlan` holds
which rows of a batch run in which stream, and their places in the stack.

The :class:`StreamCache` holds the keys and values of the stack's rows: for each layer of the model,
and for each layer that only the second stream has. It is built from the model's configuration, so a
layer with a sliding window has a sliding cache, and an additional layer's cache has the type of
layer 0's. Callers, such as beam search, reorder and repeat it by rows of the batch. Its plain layers
are :class:`PreallocatedLayer`.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from flexalign.errors import ConfigError, UnsupportedModelError

FIRST, SECOND, BOTH = 1, 2, 3
"""The streams that a row runs in, as bits: BOTH is ``FIRST | SECOND``."""

_RESERVED_TOKENS = 128
"""Tokens of space added at each copy. The space is small compared with a long prompt, and the copy,
once in 128 tokens, is cheap compared with the attention of those tokens."""


class StackPlan:
    """Which rows of a batch run in which stream, and their places in the stack.

    The stack holds the first stream's rows, then the second's.

    Attributes:
        streams: Per row of the batch: FIRST, SECOND, BOTH, or 0 for neither. Shape ``(B,)``, on
            the CPU. The tensors below are on the batch's device.
        rows: Per row of the stack: its row in the batch. Shape ``(N,)``.
        second_start: The first row of the stack that is in the second stream.
        is_mixed: Whether any row runs in both streams.
        first_at: Per row of the batch: its place in the first stream's part, or −1. Shape ``(B,)``.
        second_at: The same for the second stream, counted from the stack's start.
    """

    def __init__(self, streams: Tensor, device: torch.device) -> None:
        """Plan a batch.

        Args:
            streams: The streams of its rows, shape ``(B,)``.
            device: The batch's device.
        """
        self.streams = streams = streams.to("cpu")
        self.device = device

        first, second = ((streams & code).nonzero().flatten() for code in (FIRST, SECOND))
        self.rows = torch.cat([first, second]).to(device)
        self.second_start = len(first)
        self.first_at = self._places(first, 0)
        self.second_at = self._places(second, self.second_start)
        self.is_mixed = bool((streams == BOTH).any())

        # For `split`: a row that runs in one stream only is used for both.
        self._reference = torch.where(self.first_at < 0, self.second_at, self.first_at)
        self._aligned = torch.where(self.second_at < 0, self.first_at, self.second_at)
        self._has_batch_size = len(self.rows) == len(streams) and not self.is_mixed

    def has(self, needed: Tensor) -> bool:
        """Return whether every row runs in the streams that it needs."""
        return bool((needed & ~self.streams == 0).all())

    def stack(self, value: Any, second: Any = None) -> Any:
        """Reorder a tensor of the batch, ``(B, …)``, into the stack's rows, ``(N, …)``.

        A value that is not a tensor with B rows is returned unchanged.

        Args:
            value: The value of both streams, or of the first.
            second: The second stream's tensor, of the same shape, if it has one of its own.
        """
        if second is not None:
            rows = self.rows.to(value.device)
            parts = rows[: self.second_start], rows[self.second_start :]
            return torch.cat([value[parts[0]], second.to(value.device)[parts[1]]])
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(self.streams):
            return value
        if self._is_batch(len(value)):
            return value
        return value.index_select(0, self.rows.to(value.device))

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the two streams, each ``(B, …)``, of a stacked tensor ``(N, …)``.

        A row that runs in one stream only has that stream's values in both.
        """
        if self._is_batch(len(value)):
            return value, value
        return (
            value.index_select(0, self._reference.to(value.device)),
            value.index_select(0, self._aligned.to(value.device)),
        )

    def _is_batch(self, rows: int) -> bool:
        """Return whether all rows run in the same single stream, so that stack and batch are equal."""
        return self._has_batch_size and self.second_start in (0, rows)

    def _places(self, rows: Tensor, start: int) -> Tensor:
        places = torch.full_like(self.streams, -1)
        places[rows] = torch.arange(start, start + len(rows))
        return places.to(self.device)


class StreamCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of both streams.

    Attributes:
        plan: The stacking of its rows; None before its first use.
    """

    def __init__(self, config: Any, more_layers: int = 0) -> None:
        """Build an empty cache.

        Args:
            config: The model's configuration.
            more_layers: Number of layers that only the second stream has.

        Raises:
            UnsupportedModelError: If a layer caches anything other than keys and values.
        """
        super().__init__(config=config)
        self._depth = len(self.layers)
        self.plan: StackPlan | None = None

        for _ in range(more_layers):
            self.layers.append(DynamicCache(config=config).layers[0])

        # Sliding layers are subclasses and are not replaced: their windows are short.
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = PreallocatedLayer()

        for index, layer in enumerate(self.layers):
            if not isinstance(layer, DynamicLayer) or isinstance(layer, LinearAttentionLayer):
                raise UnsupportedModelError(
                    f"layer {index} of this {config.model_type} keeps a {type(layer).__name__}; "
                    "the two streams of InRa or of two prompts need layers that all cache keys "
                    "and values (no recurrent ones)."
                )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i of the batch by row ``beam_idx[i]``, in both streams."""
        self.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, copies side by side."""
        if self.plan is not None:
            self.take(torch.arange(len(self.plan.streams)).repeat_interleave(repeats))

    def take(self, rows: Tensor, streams: Tensor | None = None) -> None:
        """Replace the batch by rows of it.

        Args:
            rows: Per new row: the old row that it continues. Rows may be repeated or left out.
            streams: Per new row: the streams to keep. By default all streams of the old row.

        Raises:
            ConfigError: If an old row does not have a stream that is to be kept.
        """
        if self.plan is None:
            return

        old = self.plan
        kept = old.streams[rows.cpu()]
        if streams is not None:
            if bool((streams & ~kept).any()):
                raise ConfigError("the cache does not hold a stream that is to be kept.")
            kept = streams

        new = StackPlan(kept, old.device)
        sources = rows.to(old.device)[new.rows]
        first = old.first_at[sources[: new.second_start]]
        second = old.second_at[sources[new.second_start :]]
        self._index(torch.cat([first, second]), second - old.second_start)
        self.plan = new

    def fork(self, rows: Tensor, streams: Tensor) -> "StreamCache":
        """Return a new cache of rows of this one, which does not change.

        Args:
            rows: As in :meth:`take`.
            streams: As in :meth:`take`.

        Raises:
            ConfigError: If a row does not have a stream that is to be kept.
        """
        # Shallow copies are enough: `take` makes new tensors and does not write to shared ones.
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        other.take(rows, streams)
        return other

    def join(self, other: "StreamCache") -> None:
        """Add the streams of another cache over the same rows and tokens.

        Raises:
            ConfigError: If one of the two caches is empty.
        """
        mine, theirs = self.require_plan(), other.require_plan()
        new = StackPlan(mine.streams | theirs.streams, mine.device)

        # The place of each stream of each row, once the other's rows are appended to this one's.
        shift = len(mine.rows)
        first = torch.where(mine.first_at < 0, theirs.first_at + shift, mine.first_at)
        second = torch.where(mine.second_at < 0, theirs.second_at + shift, mine.second_at)

        # The second stream's own layers hold only its rows, so places count from its start.
        in_second = torch.where(
            mine.second_at < 0,
            theirs.second_at - theirs.second_start + shift - mine.second_start,
            mine.second_at - mine.second_start,
        )

        for layer, more in zip(self.layers, other.layers, strict=True):
            if not more.is_initialized:
                continue
            if not layer.is_initialized:
                # A layer of the second stream, in a cache without that stream: it has no rows yet.
                layer.lazy_initialization(more.keys, more.values)
                layer.keys, layer.values = more.keys[:0], more.values[:0]
                if hasattr(more, "cumulative_length"):
                    layer.cumulative_length = more.cumulative_length
            layer.keys = torch.cat([layer.keys, more.keys])
            layer.values = torch.cat([layer.values, more.values])

        first_rows, second_rows = new.rows[: new.second_start], new.rows[new.second_start :]
        self._index(
            torch.cat([first[first_rows], second[second_rows]]),
            in_second[second_rows],
        )
        self.plan = new

    def append(self, other: "StreamCache") -> None:
        """Add the rows of another cache with the same number of tokens.

        Args:
            other: The other cache. It must not be used afterwards.

        Raises:
            ConfigError: If one of the two caches is empty.
        """
        plan, theirs = self.require_plan(), other.require_plan().streams
        mine, device = plan.streams, plan.device

        # Treat each as a cache over the rows of both, in which the other's rows have no stream.
        self.plan = StackPlan(torch.cat([mine, torch.zeros_like(theirs)]), device)
        other.plan = StackPlan(torch.cat([torch.zeros_like(mine), theirs]), device)
        self.join(other)

    def require_plan(self) -> StackPlan:
        """Return the plan of a cache that is in use.

        Raises:
            ConfigError: If the cache is empty.
        """
        if self.plan is None:
            raise ConfigError("the cache is empty; run the prompts first.")
        return self.plan

    def _index(self, stack: Tensor, second: Tensor) -> None:
        """Keep rows of the model's layers, and of the second stream's own, in this order."""
        for index, layer in enumerate(self.layers):
            if layer.get_seq_length() > 0:
                layer.batch_select_indices(stack if index < self._depth else second)


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A dynamic cache layer whose keys and values are the first part of larger tensors.

    Transformers' dynamic layer concatenates: for each new token it copies all earlier keys and
    values into new memory. Two streams double that cost, which for long prompts is the largest
    after reading the weights. Here a new token is written into free space after the earlier ones,
    and all are copied only once in 128 tokens.

    With gradients enabled it concatenates as transformers' layer does, because tensors that are
    saved for the backward pass must not be written to.
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``(N, heads, T, dim)``; return all keys and all values."""
        if torch.is_grad_enabled():
            joined: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return joined

        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_buffer, self.keys = _append(self._buffers[0], self.keys, key_states)
        value_buffer, self.values = _append(self._buffers[1], self.values, value_states)
        self._buffers = key_buffer, value_buffer
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, and release the buffers of the old ones."""
        super().batch_select_indices(indices)
        self._buffers = (None, None)

    def reset(self) -> None:
        """Remove all tokens, and release the buffers."""
        super().reset()
        self._buffers = (None, None)


def _append(buffer: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Write ``new`` after ``held``; return the buffer and the part of it that is filled."""
    past = held.shape[-2] if held.numel() else 0
    filled = past + new.shape[-2]

    if buffer is None or not _can_extend(buffer, held, filled):
        buffer = new.new_empty((*new.shape[:-2], filled + _RESERVED_TOKENS, new.shape[-1]))
        if past:
            buffer[..., :past, :] = held
    buffer[..., past:filled, :] = new
    return buffer, buffer[..., :filled, :]


def _can_extend(buffer: Tensor, held: Tensor, filled: int) -> bool:
    """Return whether ``held`` is the first part of this buffer, and the buffer can be extended.

    If rows were selected, cropped or moved to another device since the last call, ``held`` has
    another address.
    """
    return (
        held.data_ptr() == buffer.data_ptr()
        and held.stride() == buffer.stride()
        and held.shape[:-2] == buffer.shape[:-2]
        and filled <= buffer.shape[-2]
        and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    )
