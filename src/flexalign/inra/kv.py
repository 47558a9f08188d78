"""The cache of both streams: the model's own layers, and one more for each adapter layer.

It is built from the model's configuration, so sliding windows stay sliding; an adapter layer's
cache has the type of layer 0's. Its rows are those of the stack (:class:`~flexalign.inra.Plan`),
but it is reordered and repeated by rows of the batch, as beam search asks it to.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from flexalign.errors import ConfigError, UnsupportedModelError
from flexalign.inra.room import RoomyLayer
from flexalign.inra.streams import Plan

__all__ = ["StreamCache"]


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
