"""The cache of both streams: the model's own layers, and one more for each adapter layer.

It is built from the model's configuration, so sliding windows stay sliding; an adapter layer's
cache has the type of layer 0's. Its rows are those of the stack (:class:`~flexalign.inra.Plan`),
but it is reordered and repeated by rows of the batch, as beam search asks it to.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from flexalign.errors import ConfigError, UnsupportedModelError

# A cache layer with room for the tokens to come.
#
# Transformers' dynamic layer concatenates: each token copies all keys and values before it into new
# memory. With two streams that is twice as much, and the largest cost of long prompts beside the
# weights. Here a token is written behind those before it, and the whole is copied once in every
# 128 tokens.

_ROOM = 128
"""Tokens reserved: few beside a long prompt, and a copy costs 1/128 of the attention between."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A dynamic layer whose keys and values are the beginning of larger tensors.

    With gradients on it concatenates like any other, as what is saved for the backward pass must
    not be written to.
    """

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``(N, heads, T, dim)``, and return all so far."""
        if torch.is_grad_enabled():
            joined: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return joined
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_room, self.keys = _append(self._rooms[0], self.keys, key_states)
        value_room, self.values = _append(self._rooms[1], self.values, value_states)
        self._rooms = key_room, value_room
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, and no room of the old ones."""
        super().batch_select_indices(indices)
        self._rooms = (None, None)

    def reset(self) -> None:
        """Forget everything, the room included."""
        super().reset()
        self._rooms = (None, None)


def _append(room: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Write ``new`` behind ``held``; return the room and what is filled of it."""
    past = held.shape[-2] if held.numel() else 0
    filled = past + new.shape[-2]
    if room is None or not _holds(room, held, filled):
        room = new.new_empty((*new.shape[:-2], filled + _ROOM, new.shape[-1]))
        if past:
            room[..., :past, :] = held
    room[..., past:filled, :] = new
    return room, room[..., :filled, :]


def _holds(room: Tensor, held: Tensor, filled: int) -> bool:
    """Whether ``held`` is the beginning of this room, which may be written to and is large enough.

    Rows selected, cropped or moved to another device in the meantime are seen by their address.
    """
    return (
        held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:-2] == room.shape[:-2]
        and filled <= room.shape[-2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )


# Two ways through one model, as rows of one batch.
#
# The base stream goes embeddings → layers; the adapter stream goes embeddings → adapter → layers.
# Stacked as rows they cost one pass, and every weight is read once. A :class:`Plan` says which rows
# of a batch travel by which stream; an :class:`Entry` lets the adapter's rows through the adapter,
# by a hook on layer 0's own inputs: its masks, rotary tables and cache are at hand there.

BASE, ADAPTER, BOTH = 1, 2, 3


class Plan:
    """Which rows of a batch travel by which stream, and where they lie in the stack.

    The stack holds the base stream's rows first, then the adapter stream's.

    Attributes:
        streams: Per row of the batch BASE, ADAPTER, BOTH, or 0 for neither. Shape ``(B,)``, on
            the CPU; what follows is on the batch's device.
        rows: Per row of the stack its row in the batch. Shape ``(N,)``.
        entry: The first row of the stack that goes through the adapter.
        is_mixed: Whether any row travels by both.
        base_at: Per row of the batch its place in the base stream's part, or −1. Shape ``(B,)``.
        adapter_at: The same for the adapter stream, counted from the stack's start.
    """

    def __init__(self, streams: Tensor, device: torch.device) -> None:
        self.streams = streams = streams.to("cpu")
        self.device = device
        base, adapter = ((streams & code).nonzero().flatten() for code in (BASE, ADAPTER))
        self.rows = torch.cat([base, adapter]).to(device)
        self.entry = len(base)
        self.base_at = self._places(base, 0)
        self.adapter_at = self._places(adapter, self.entry)
        self.is_mixed = bool((streams == BOTH).any())
        self._reference = torch.where(self.base_at < 0, self.adapter_at, self.base_at)
        self._aligned = torch.where(self.adapter_at < 0, self.base_at, self.adapter_at)
        self._is_batch = len(self.rows) == len(streams) and not self.is_mixed

    def has(self, needed: Tensor) -> bool:
        """Whether every row travels by the streams that it needs."""
        return bool((needed & ~self.streams == 0).all())

    def stack(self, value: Any) -> Any:
        """Bring a tensor of the batch, ``(B, …)``, into the order of the stack, ``(N, …)``.

        What is no tensor with a row for each row of the batch is returned as it is.
        """
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(self.streams):
            return value
        if self._is_batch and self.entry in (0, len(value)):
            return value
        return value.index_select(0, self.rows.to(value.device))

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return, of a stacked tensor ``(N, …)``, the two streams' rows ``(B, …)``.

        A row that travels by one stream only has that stream's values in both.
        """
        if self._is_batch and self.entry in (0, len(value)):
            return value, value
        return (
            value.index_select(0, self._reference.to(value.device)),
            value.index_select(0, self._aligned.to(value.device)),
        )

    def _places(self, rows: Tensor, start: int) -> Tensor:
        places = torch.full_like(self.streams, -1)
        places[rows] = torch.arange(start, start + len(rows))
        return places.to(self.device)


class Entry:
    """Where the adapter stream's rows turn off, before layer 0.

    The hook does nothing unless this entry has been opened in the same context (thread, task), so
    the base model stays itself for everybody else; while it `stands_open`, as in training, every
    row goes through the adapter except where :meth:`open` says otherwise.

    Attributes:
        stands_open: Whether it is open where no context has opened it.
    """

    def __init__(self, layer: nn.Module, adapters: Sequence[nn.Module] | nn.ModuleList) -> None:
        self.stands_open = False
        self._adapters = adapters
        self.handle = layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    @contextmanager
    def open(self, rows: int, first: int) -> Iterator[None]:
        """Send the rows from ``first`` on, of a stack of ``rows``, through the adapter."""
        token = _OPEN.set((self, rows, first))
        try:
            yield
        finally:
            _OPEN.reset(token)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry, rows, first = _OPEN.get()
        if entry is not self:
            if not self.stands_open:
                return None
            rows = first = 0
        elif first == rows:
            return None
        given, named = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        own = {key: _rows_from(v, rows, first) for key, v in kwargs.items() if key != _HIDDEN}
        own_named = tuple(_rows_from(value, rows, first) for value in named)
        hidden = given[first:]
        for adapter in self._adapters:
            output = adapter(hidden, *own_named, **own)
            hidden = output[0] if isinstance(output, tuple) else output
        if first:
            hidden = torch.cat([given[:first], hidden])
        return ((hidden, *named), kwargs) if args else (args, {**kwargs, _HIDDEN: hidden})


_HIDDEN = "hidden_states"
_OPEN: ContextVar[tuple[Entry | None, int, int]] = ContextVar("open entry", default=(None, 0, 0))


def _rows_from(value: Any, rows: int, first: int) -> Any:
    """Cut a layer's input to the rows from ``first`` on, wherever it has one for each row."""
    if not first:
        return value
    if isinstance(value, Tensor):
        return value[first:] if value.ndim > 0 and len(value) == rows else value
    if isinstance(value, tuple | list):
        return type(value)(_rows_from(part, rows, first) for part in value)
    if isinstance(value, dict):
        return {key: _rows_from(part, rows, first) for key, part in value.items()}
    return value


class StreamCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of both streams.

    Attributes:
        plan: How its rows are stacked; None until it is first used.
    """

    def __init__(self, config: Any, adapter_layers: int) -> None:
        """Build an empty cache.

        Args:
            config: The base model's configuration.
            adapter_layers: Number of adapter layers.

        Raises:
            UnsupportedModelError: If a layer keeps anything but keys and values.
        """
        super().__init__(config=config)
        self._depth = len(self.layers)
        for _ in range(adapter_layers):
            self.layers.append(DynamicCache(config=config).layers[0])
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = RoomyLayer()
        self.plan: Plan | None = None
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, DynamicLayer) or isinstance(layer, LinearAttentionLayer):
                raise UnsupportedModelError(
                    f"layer {index} of this {config.model_type} keeps a {type(layer).__name__}; "
                    "InRa serves models whose layers all cache keys and values (no recurrent "
                    "ones)."
                )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i of the batch go on from row ``beam_idx[i]``, in both streams."""
        self.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, copies side by side."""
        if self.plan is not None:
            self.take(torch.arange(len(self.plan.streams)).repeat_interleave(repeats))

    def take(self, rows: Tensor, streams: Tensor | None = None) -> None:
        """Make a new batch out of rows of this one.

        Args:
            rows: Per new row the old one it goes on from; any number, with or without repeats.
            streams: Per new row the streams to keep; all that the old row has if not given.

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
        new = Plan(kept, old.device)
        sources = rows.to(old.device)[new.rows]
        base = old.base_at[sources[: new.entry]]
        adapter = old.adapter_at[sources[new.entry :]]
        self._index(torch.cat([base, adapter]), adapter - old.entry)
        self.plan = new

    def fork(self, rows: Tensor, streams: Tensor) -> "StreamCache":
        """Return a cache of its own for rows of this one, which stays as it is.

        Args:
            rows: As in :meth:`take`.
            streams: As in :meth:`take`.

        Raises:
            ConfigError: If a row does not have a stream that is to be kept.
        """
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        other.take(rows, streams)
        return other

    def join(self, other: "StreamCache") -> None:
        """Add the streams of another cache over the same rows and tokens.

        Raises:
            ConfigError: If one of the two is empty.
        """
        mine, theirs = self._used_plan(), other._used_plan()
        new = Plan(mine.streams | theirs.streams, mine.device)
        shift = len(mine.rows)
        base = torch.where(mine.base_at < 0, theirs.base_at + shift, mine.base_at)
        adapter = torch.where(mine.adapter_at < 0, theirs.adapter_at + shift, mine.adapter_at)
        entries = torch.where(
            mine.adapter_at < 0,
            theirs.adapter_at - theirs.entry + shift - mine.entry,
            mine.adapter_at - mine.entry,
        )
        for layer, more in zip(self.layers, other.layers, strict=True):
            if not more.is_initialized:
                continue
            if not layer.is_initialized:
                layer.lazy_initialization(more.keys, more.values)
                layer.keys, layer.values = more.keys[:0], more.values[:0]
                if hasattr(more, "cumulative_length"):
                    layer.cumulative_length = more.cumulative_length
            layer.keys = torch.cat([layer.keys, more.keys])
            layer.values = torch.cat([layer.values, more.values])
        self._index(
            torch.cat([base[new.rows[: new.entry]], adapter[new.rows[new.entry :]]]),
            entries[new.rows[new.entry :]],
        )
        self.plan = new

    def append(self, other: "StreamCache") -> None:
        """Add the rows of another cache of as many tokens, which is used up by it.

        Raises:
            ConfigError: If one of the two is empty.
        """
        plan, theirs = self._used_plan(), other._used_plan().streams
        mine, device = plan.streams, plan.device
        self.plan = Plan(torch.cat([mine, torch.zeros_like(theirs)]), device)
        other.plan = Plan(torch.cat([torch.zeros_like(mine), theirs]), device)
        self.join(other)

    def _used_plan(self) -> Plan:
        if self.plan is None:
            raise ConfigError("the cache is empty; run the prompts first.")
        return self.plan

    def _index(self, stack: Tensor, adapters: Tensor) -> None:
        for index, layer in enumerate(self.layers):
            if layer.get_seq_length() > 0:
                layer.batch_select_indices(stack if index < self._depth else adapters)
