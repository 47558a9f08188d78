"""Filling a cache: both teachers run once over every document, shard by shard.

Several processes can fill one folder together. Each claims a shard that no other process is writing,
and all processes end when all shards are written. A shard is written as a whole, by a rename, and
its checksum after it, so a process may be killed at any time. When filling is started again, shards
with a correct checksum are kept and all others are written. The batches of a shard do not depend on
other shards, so on the same machine a shard is reproduced bit for bit.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexalign._storage import write_bytes
from flexalign.errors import ConfigError
from flexalign.models.pair import SIDES, ModelPair
from flexalign.training.checkpoints import writing
from flexalign.training.hidden_cache.documents import KEY_BYTES, Document
from flexalign.training.hidden_cache.format import (
    HEADS,
    MANIFEST,
    OWNER,
    SHARD_BYTES,
    Form,
    claim,
    dtype_name,
    fault_of_file,
    plan_shards,
    read_json,
    require_room,
    require_same,
    save_tensors,
    shard_name,
)
from flexalign.training.hidden_cache.read import HiddenStateCache
from flexalign.training.output import is_unused

_BATCH_TOKENS = 4096
_PATIENCE_SECONDS = 0.2


def write_cache(
    folder: Path,
    identity: dict[str, Any],
    documents: Callable[[], list[Document]],
    load_pair: Callable[[], ModelPair],
    *,
    form: Form,
    shard_bytes: int = SHARD_BYTES,
    anyway: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HiddenStateCache:
    """Write the missing and damaged files of a cache, and open it.

    Args:
        folder: The cache's folder; it need not exist.
        identity: The cache's identity, from `identity_of`.
        documents: Prepares the data. Called only if a file is missing.
        load_pair: Loads both models onto their devices. Called only if a file is missing.
        form: Widths and dtypes of the cache, from which its size is known without weights.
        shard_bytes: The maximal size of a shard.
        anyway: Write even if the disk's free space is too small.
        say: Called with messages of one line.
        progress: Called with (positions written, positions in all).

    Raises:
        ConfigError: If the folder holds another cache or other files, the data has no response
            token, or the free space is too small.
        CheckpointError: If the folder cannot be written to.
    """
    owner = identity | {"dtype": dtype_name(form.dtype), "shard_bytes": shard_bytes}
    before = read_json(folder / OWNER)
    if before is not None:
        require_same(folder, before, owner)
        if _is_whole(folder, say):
            return HiddenStateCache.open(folder, verify=False)
    elif not is_unused(folder):
        raise ConfigError(f"{folder} holds files that are of no cache; name another cache_dir.")

    prepared = documents()
    if not prepared:
        raise ConfigError("no row keeps a response token within the cut-off; nothing to cache.")
    work = _Work(folder, prepared, load_pair, form, shard_bytes)
    missing = work.missing_bytes()
    need = require_room(folder, missing, anyway=anyway)
    say(
        f"{work.tokens:,} response tokens × {form.token_bytes:,} bytes "
        f"({form.widths[0]} + {form.widths[1]} numbers in {owner['dtype']}), and the heads: {need}"
    )

    with writing("the cache", folder, remains="the files that are there stand"):
        folder.mkdir(parents=True, exist_ok=True)
        if before is None:
            write_bytes(folder / OWNER, json.dumps(owner, indent=2).encode())
            require_same(folder, read_json(folder / OWNER) or {}, owner)
        work.run(progress)
        work.finish(owner)
    return HiddenStateCache.open(folder, verify=False)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of the hidden states of a cache, finished or not; None if there is none."""
    owner = read_json(folder / OWNER)
    return None if owner is None else getattr(torch, str(owner["dtype"]))


def _is_whole(folder: Path, say: Callable[[str], None]) -> bool:
    """Return whether all files are complete; delete the notes of those that are not."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return False
    whole = True
    for name, note in manifest["files"].items():
        fault = fault_of_file(folder / name, note)
        if fault:
            say(f"{fault}; it is made again")
            (folder / name).with_suffix(".json").unlink(missing_ok=True)
            whole = False
    return whole


class _Work:
    """The files of one cache. Each is written by the process that claims it."""

    def __init__(
        self,
        folder: Path,
        documents: Sequence[Document],
        load_pair: Callable[[], ModelPair],
        form: Form,
        shard_bytes: int,
    ) -> None:
        self._folder, self._documents, self._form = folder, documents, form
        self._load_pair = load_pair
        self._pair: ModelPair | None = None
        counts = [len(document.positions) for document in documents]
        self.tokens = sum(counts)
        self._shards = plan_shards(counts, form.token_bytes, shard_bytes)
        self._since = time.time()

    def missing_bytes(self) -> int:
        """Return the bytes of the files that are missing; damaged files do not count."""
        counts = map(self._count, self._shards)
        sizes = [self._form.head_bytes, *(count * self._form.token_bytes for count in counts)]
        paths = self._paths()
        return sum(
            size
            for path, size in zip(paths, sizes, strict=True)
            if not path.with_suffix(".json").exists()
        )

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Write missing files, and wait for those that other processes write, until all exist."""
        pending = [-1, *range(len(self._shards))]  # −1 is the file of the heads
        done = 0
        while pending:
            still = []
            for index in pending:
                with claim(self._folder, index + 1) as is_mine:
                    if not is_mine:
                        still.append(index)
                        continue
                    self._ensure(index)
                done += self._count(self._shards[index]) if index >= 0 else 0
                progress(done, self.tokens)
            if len(still) == len(pending):
                time.sleep(_PATIENCE_SECONDS)
            pending = still

    def finish(self, owner: dict[str, Any]) -> None:
        """Write the notes of all files into the manifest."""
        notes = {path.name: read_json(path.with_suffix(".json")) or {} for path in self._paths()}
        shards = [note for name, note in notes.items() if name != HEADS]

        facts = {
            "format_version": 1,
            **owner,
            "documents": len(self._documents),
            "tokens": self.tokens,
            "input_tokens": sum(note["input_tokens"] for note in shards),
            "forward_seconds": sum(note["forward_seconds"] for note in shards),
            "bytes": sum(note["bytes"] for note in notes.values()),
            "heads": {side: notes[HEADS][side] for side in SIDES},
            "files": {
                name: {key: note[key] for key in ("sha256", "bytes")}
                for name, note in notes.items()
            },
        }
        write_bytes(self._folder / MANIFEST, json.dumps(facts, indent=2).encode())

        # All files are complete, so partial files are left from processes that were killed.
        for path in self._paths():
            for partial in self._folder.glob(f".{path.stem}.*.partial"):
                partial.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return [self._path(index) for index in range(-1, len(self._shards))]

    def _path(self, index: int) -> Path:
        return self._folder / (HEADS if index < 0 else shard_name(index))

    def _count(self, shard: range) -> int:
        return sum(len(self._documents[index].positions) for index in shard)

    def _ensure(self, index: int) -> None:
        """Write a file, unless it exists with a correct checksum."""
        path = self._path(index)
        note_path = path.with_suffix(".json")
        with suppress(FileNotFoundError):
            if note_path.stat().st_mtime >= self._since:
                return  # written or checked by another process since this one started
            if fault_of_file(path, read_json(note_path)) is None:
                os.utime(note_path)
                return
        if index < 0:
            self._make_heads(path)
        else:
            self._make_shard(path, [self._documents[number] for number in self._shards[index]])

    def _loaded(self) -> ModelPair:
        if self._pair is None:
            self._pair = self._load_pair()
        return self._pair

    def _make_heads(self, path: Path) -> None:
        heads = self._loaded().heads
        tensors, forms = {}, {}
        for side, head in zip(SIDES, heads, strict=True):
            shared = side != SIDES[0] and head is heads.reference
            forms[side] = {
                "vocab_size": head.vocab_size,
                "scale": head.scale,
                "softcap": head.softcap,
                "shared": shared,
            }
            if not shared:
                tensors[f"{side}.weight"] = head.weight.detach().cpu().contiguous()
                if head.bias is not None:
                    tensors[f"{side}.bias"] = head.bias.detach().cpu().contiguous()
        save_tensors(path, tensors, **forms)

    def _make_shard(self, path: Path, documents: Sequence[Document]) -> None:
        pair = self._loaded()
        counts = [len(document.positions) for document in documents]
        starts = torch.tensor([0, *counts]).cumsum(0)
        tensors: dict[str, Tensor] = {
            side: torch.empty((sum(counts), head.width), dtype=self._form.dtype)
            for side, head in zip(SIDES, pair.heads, strict=True)
        }

        seconds, like = 0.0, pair.heads.reference.weight
        for batch in _batches([document.longest for document in documents]):
            began = time.perf_counter()
            hidden = {
                side: pair.hidden(
                    side, **_padded([documents[number].of_side(side) for number in batch], like)
                )
                for side in SIDES
            }
            for row, number in enumerate(batch):
                for side in SIDES:
                    where = torch.from_numpy(documents[number].of_side(side).positions)
                    kept = hidden[side][row, where.to(hidden[side].device)]
                    tensors[side][starts[number] : starts[number + 1]] = kept
            seconds += time.perf_counter() - began

        keys = b"".join(document.key for document in documents)
        tensors["keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, KEY_BYTES)
        tensors["starts"] = starts
        tokens = sum(len(document.tokens) for document in documents)
        save_tensors(path, tensors, input_tokens=tokens, forward_seconds=seconds)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group documents of similar length into batches of at most `_BATCH_TOKENS` padded tokens.

    A longer document is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(documents: Sequence[Document], like: Tensor) -> dict[str, Tensor]:
    """Return token ids and mask, each ``(B, T)``, padded on the right, on the device of `like`."""
    longest = max(len(document.tokens) for document in documents)
    ids = torch.zeros((len(documents), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document.tokens)] = torch.from_numpy(document.tokens)
        mask[row, : len(document.tokens)] = 1
    return {"input_ids": ids.to(like.device), "attention_mask": mask.to(like.device)}
