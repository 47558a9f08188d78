"""From the cache into the batch: hidden states beside the tokens that they belong to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from flexalign.trra.cache.documents import documents_of
from flexalign.trra.cache.reading import HiddenStateCache, States

__all__ = ["CACHED", "CachedCollator"]

CACHED = "cached_states"
"""The batch's entry: for each side a list of ``(N, H)``, one for each document in order."""


class CachedCollator:
    """TRL's collator, and beside what it gives the hidden states of the same documents.

    In the training process they stay on mapped memory: the system reads ahead while earlier
    batches are trained on, and nothing is held twice. A worker process, which reads ahead itself,
    copies them.
    """

    def __init__(
        self, collate: Callable[[Sequence[Any]], dict[str, Any]], cache: HiddenStateCache
    ) -> None:
        """Join the two."""
        self._collate, self._cache = collate, cache

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of prepared rows."""
        found = [self._cache.states(document) for row in rows for document in documents_of(row)]
        sides = {side: [getattr(states, side) for states in found] for side in States._fields}
        if get_worker_info() is not None:
            sides = {side: [torch.cat(parts)] for side, parts in sides.items()}
        return {**self._collate(rows), CACHED: sides}
