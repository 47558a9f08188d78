"""Reading a finished cache: mapped into memory, by document, in any order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import get_worker_info

from flexalign.errors import CheckpointError, ConfigError, DataError
from flexalign.heads import Head, are_equal
from flexalign.models.pair import Heads
from flexalign.training.hidden_cache.documents import KEY_BYTES, Document, documents_of
from flexalign.training.hidden_cache.format import (
    HEADS,
    MANIFEST,
    MappedShard,
    fault_of_file,
    read_json,
    require_same,
)

_OPEN_SHARDS = 256


class States(NamedTuple):
    """Both teachers' final hidden states at a document's kept positions, each ``(N, H)``."""

    reference: Tensor
    aligned: Tensor


@dataclass(frozen=True)
class _Location:
    shard: str
    start: int
    count: int


class HiddenStateCache:
    """Both teachers' final hidden states and their heads, as `write_cache` wrote them.

    Attributes:
        folder: The cache's folder.
        facts: Its manifest: the identity (`pair`, `data`, `template`, …), `dtype`, `tokens`
            (kept positions), `input_tokens`, `forward_seconds`, `bytes`.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Map a cache without checking its files; use `open` to check them."""
        self.folder, self.facts = folder, facts
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._map)
        self._index = dict(self._locate())

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "HiddenStateCache":
        """Open a finished cache.

        Args:
            folder: The cache's folder.
            verify: Read all files once and compare their checksums. Of several processes, each
                reads its share.

        Raises:
            ConfigError: If there is no finished cache.
            CheckpointError: If a file is missing or damaged; names the file.
        """
        folder = Path(folder)
        facts = read_json(folder / MANIFEST)
        if facts is None or "files" not in facts:
            raise ConfigError(
                f"{folder} is no finished cache (it has no {MANIFEST}); make it, or what is left "
                "of it, with flexalign cache."
            )
        state = PartialState()
        names = sorted(facts["files"])
        for name in names[state.process_index :: state.num_processes] if verify else ():
            fault = fault_of_file(folder / name, facts["files"][name])
            if fault:
                raise CheckpointError(
                    f"the cache {folder} is damaged: {fault}; run flexalign cache again, which "
                    "makes that file again."
                )
        return cls(folder, facts)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the heads score."""
        return int(self.facts["heads"]["reference"]["vocab_size"])

    def require_same(self, identity: Mapping[str, Any]) -> None:
        """Check that the cache has the identity that a run needs, from `identity_of`.

        Raises:
            ConfigError: If they differ; names the differences.
        """
        require_same(self.folder, self.facts, identity)

    def require_all(self, rows: Any, what: str) -> None:
        """Check that the cache has all documents of prepared rows.

        Args:
            rows: A data set, a mapping of several, or None.
            what: The data set's name in messages.

        Raises:
            DataError: If a document is not in the cache.
        """
        if isinstance(rows, Mapping):
            for name, part in rows.items():
                self.require_all(part, f"{what} {name}")
            return
        for number, row in enumerate(rows or (), start=1):
            for document in documents_of(row):
                self._location(document, f"row {number} of {what}")

    def heads(self, device: torch.device) -> Heads:
        """Load both heads. If their values are equal, they are the same object."""
        mapped = MappedShard(self.folder / HEADS)
        heads: dict[str, Head] = {}
        for side, form in self.facts["heads"].items():
            if form["shared"]:
                heads[side] = heads["reference"]
                continue
            weight = mapped.tensor(f"{side}.weight").to(device)
            bias = mapped.tensor(f"{side}.bias").to(device) if f"{side}.bias" in mapped else None
            heads[side] = Head(weight, bias, form["scale"], form["softcap"])
        if are_equal(heads["reference"], heads["aligned"]):
            heads["aligned"] = heads["reference"]
        return Heads(**heads)

    def states(self, document: Document) -> States:
        """Return a document's hidden states on mapped memory, and start reading them from disk.

        Raises:
            DataError: If the document is not in the cache.
        """
        at = self._location(document, "a row")
        shard = self._shard(at.shard)
        for side in States._fields:
            shard.will_need(side, at.start, at.count)
        return States(*(shard.rows(side, at.start, at.count) for side in States._fields))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory maps; a worker process creates its own."""
        return {"folder": self.folder, "facts": self.facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _map(self, name: str) -> MappedShard:
        return MappedShard(self.folder / name)

    def _locate(self) -> Iterator[tuple[bytes, _Location]]:
        for name in self.facts["files"]:
            if name == HEADS:
                continue
            shard = self._shard(name)
            keys = shard.tensor("keys").numpy().tobytes()
            starts = shard.tensor("starts").tolist()
            for number, start in enumerate(starts[:-1]):
                key = keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
                yield key, _Location(name, start, starts[number + 1] - start)

    def _location(self, document: Document, what: str) -> _Location:
        if not len(document.positions):
            return self._nothing
        try:
            return self._index[document.key]
        except KeyError:
            raise DataError(
                f"{what} is not in the cache {self.folder}: its tokens, or those that count, are "
                "others than when it was made; train on the data that the cache is of."
            ) from None

    @property
    def _nothing(self) -> _Location:
        return _Location(next(name for name in self.facts["files"] if name != HEADS), 0, 0)


# From the cache into the batch.

CACHED = "cached_states"
"""The batch's key of hidden states: per teacher a list of ``(N, H)``, one per document, in order."""


class CachedCollator:
    """TRL's collator, extended by the hidden states of the batch's documents.

    In the training process the hidden states are not copied from mapped memory: the operating
    system reads them while earlier batches are trained on. A data loader's worker process copies
    them.
    """

    def __init__(
        self, collate: Callable[[Sequence[Any]], dict[str, Any]], cache: HiddenStateCache
    ) -> None:
        """Create the collator.

        Args:
            collate: TRL's collator.
            cache: The cache, which must have all documents of the rows.
        """
        self._collate, self._cache = collate, cache

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of prepared rows, with the hidden states under `CACHED`."""
        found = [self._cache.states(document) for row in rows for document in documents_of(row)]
        sides = {side: [getattr(states, side) for states in found] for side in States._fields}
        if get_worker_info() is not None:
            sides = {side: [torch.cat(parts)] for side, parts in sides.items()}
        return {**self._collate(rows), CACHED: sides}
