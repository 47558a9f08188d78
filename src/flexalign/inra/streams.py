"""Two ways through one model, as rows of one batch.

The base stream goes embeddings → layers; the adapter stream goes embeddings → adapter → layers.
Stacked as rows they cost one pass, and every weight is read once. A :class:`Plan` says which rows
of a batch travel by which stream; an :class:`Entry` lets the adapter's rows through the adapter,
by a hook on layer 0's own inputs: its masks, rotary tables and cache are at hand there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ADAPTER", "BASE", "BOTH", "Entry", "Plan"]

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
