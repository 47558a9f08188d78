"""The cache's folder: its files, their sizes, and the locks of the processes that write them."""

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from flexalign._differences import differences
from flexalign._storage import free_bytes, write_bytes
from flexalign.data.rendering import chat_template_of
from flexalign.data.template import template_arguments
from flexalign.errors import ConfigError
from flexalign.training.pair_rows import PairRows

OWNER = "cache.json"
"""The identity of the cache: its pair, data and settings. Written first."""

MANIFEST = "manifest.json"
"""All checksums and counts. Written last, so a cache with a manifest was complete."""

HEADS = "heads.safetensors"

CLAIMS = ".claims"
"""An empty file for locks: a process that writes a file of the cache locks one byte of it."""

SHARD_BYTES = 128 * 2**20
"""The maximal size of a file of hidden states. A document is never split."""

_GIB = 2**30


def hidden_width(config: Any) -> int:
    """Return the width of the hidden states that a model's head takes."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


@dataclass(frozen=True)
class Form:
    """Widths and dtypes of a cache. They decide its size, and need no weights.

    Attributes:
        widths: Widths of the two models' hidden states.
        vocab_size: Number of tokens that both heads score.
        shared_head: Whether the pair has one head, as a base and an adapter on it have.
        dtype: The dtype of stored hidden states.
        head_dtype: The dtype of stored heads, which is that of the loaded models.
    """

    widths: tuple[int, int]
    vocab_size: int
    shared_head: bool
    dtype: torch.dtype
    head_dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of both hidden states of one response token."""
        return sum(self.widths) * self.dtype.itemsize

    @property
    def head_bytes(self) -> int:
        """Bytes of the heads."""
        widths = self.widths[:1] if self.shared_head else self.widths
        return self.vocab_size * sum(widths) * self.head_dtype.itemsize


def shard_name(index: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{index:05d}.safetensors"


def plan_shards(counts: Sequence[int], token_bytes: int, shard_bytes: int) -> list[range]:
    """Group documents, in order, into shards of at most `shard_bytes`, or of one document.

    Args:
        counts: Number of kept positions of each document.
        token_bytes: Bytes of one position: both hidden states.
        shard_bytes: The maximal size of a shard.

    Returns:
        The documents' indices, one range for each shard.
    """
    shards: list[range] = []
    start, size = 0, 0
    for index, count in enumerate(counts):
        if size and size + count * token_bytes > shard_bytes:
            shards.append(range(start, index))
            start, size = index, 0
        size += count * token_bytes
    if counts:
        shards.append(range(start, len(counts)))
    return shards


def require_room(folder: Path, size: int, *, anyway: bool) -> str:
    """Compare the bytes that are still to be written with the disk's free space.

    Args:
        folder: The cache's folder; it need not exist.
        size: Bytes that are still to be written.
        anyway: Do not raise if they do not fit.

    Returns:
        Both numbers, in words.

    Raises:
        ConfigError: If they do not fit, unless `anyway` is set.
    """
    free = free_bytes(folder)
    need = f"the cache takes {size / _GIB:.3g} GiB more, and {free / _GIB:.3g} GiB are free"
    if size > free and not anyway:
        raise ConfigError(
            f"{need} in {folder}; name another cache_dir, store it in bfloat16 (--dtype), take "
            "fewer rows or a smaller max_length, or write it anyway with --anyway."
        )
    return need


@contextmanager
def claim(folder: Path, index: int) -> Iterator[bool]:
    """Try to lock a file of the cache for this process, until the end of the block or the process.

    On a file system without locks every claim succeeds. Two processes may then write the same file,
    but each file is still written as a whole.

    Args:
        folder: The cache's folder.
        index: The file: 0 for the heads, k + 1 for shard k.

    Yields:
        Whether no other process holds the lock.
    """
    handle = os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:
            pass
        yield True
    finally:
        os.close(handle)


# One file of hidden states: writing, checking, and mapping into memory.

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def save_tensors(path: Path, tensors: dict[str, Tensor], **facts: Any) -> None:
    """Write tensors as safetensors, then a JSON note with the file's checksum and size.

    Args:
        path: The file. The note's name has the suffix ``.json`` instead.
        tensors: The tensors by name.
        **facts: More entries of the note.
    """
    content = save(tensors)
    write_bytes(path, content)
    note = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **facts}
    write_bytes(path.with_suffix(".json"), json.dumps(note).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; return None if there is no file, or it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def fault_of_file(path: Path, note: dict[str, Any] | None) -> str | None:
    """Return what is wrong with a file that `save_tensors` wrote; None if it is complete."""
    if note is None or not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != note.get("bytes"):
        return f"{path.name} is cut off"
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return (
        None if checksum == note.get("sha256") else f"{path.name} is corrupt (its checksum differs)"
    )


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape[1:]).numel())


class MappedShard:
    """The tensors of a safetensors file, mapped into memory and read on use."""

    def __init__(self, path: Path) -> None:
        """Map a file; its checksum must have been verified."""
        with path.open("rb") as file:
            # A private, writable map, because torch takes no read-only memory. It is not written.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        head = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + head])
        header.pop("__metadata__", None)
        self._places = {
            name: _Place(_DTYPES[part["dtype"]], tuple(part["shape"]), 8 + head + start)
            for name, part in header.items()
            for start in [part["data_offsets"][0]]
        }

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, on the mapped memory."""
        return self.rows(name, 0, self._places[name].shape[0])

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Return rows ``start … start + count − 1`` of a tensor, on the mapped memory."""
        place = self._places[name]
        shape = (count, *place.shape[1:])
        if not torch.Size(shape).numel():
            return torch.empty(shape, dtype=place.dtype)
        flat = torch.frombuffer(
            self._map,
            dtype=place.dtype,
            count=torch.Size(shape).numel(),
            offset=place.offset + start * place.row_bytes,
        )
        return flat.view(shape)

    def will_need(self, name: str, start: int, count: int) -> None:
        """Ask the operating system to start reading rows, without waiting for them."""
        place = self._places[name]
        first = place.offset + start * place.row_bytes
        page = first - first % mmap.PAGESIZE
        if count and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, page, first - page + count * place.row_bytes)


# The identity of a cache, and whether it is the one that a run needs.

_NAMES = {
    "pair": "the pair",
    "data": "the data set",
    "template": "the chat template",
    "template_arguments": "the template's arguments",
    "max_length": "the cut-off max_length",
    "truncation": "the end that the cut-off keeps",
    "completion_only": "completion_only_loss",
    "assistant_only": "assistant_only_loss",
    "eos_token": "the end token",
    "vocabulary": "the number of tokens",
    "prompts": "the prompts of the two sides",
}


def identity_of(
    pair: tuple[str | None, str | None],
    data: str,
    tokenizer: Any,
    args: Any,
    pair_rows: PairRows | None = None,
) -> dict[str, Any]:
    """Return everything that decides which hidden states a run needs.

    Args:
        pair: Fingerprints of the reference and the aligned model.
        data: Fingerprint of the data set.
        tokenizer: The pair's tokenizer.
        args: The run's ``TrRaConfig``.
        pair_rows: Renders the data under two prompts, if the sides have prompts of their own.
    """
    template = chat_template_of(tokenizer, args.chat_template_path)
    arguments = template_arguments(tokenizer)
    return {
        "pair": list(pair),
        "data": data,
        "template": _short_hash(template),
        "max_length": args.max_length,
        "truncation": "keep_start" if args.packing else args.truncation_mode,
        "completion_only": args.completion_only_loss,
        "assistant_only": args.assistant_only_loss,
        "eos_token": args.eos_token or tokenizer.eos_token,
        "vocabulary": len(tokenizer),
        "prompts": None if pair_rows is None else pair_rows.prompts.to_json(),
        **({"template_arguments": arguments} if arguments else {}),
    }


def require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a cache has the identity that a run needs.

    Args:
        folder: The cache's folder, for the message.
        before: The cache's identity; it may have more keys.
        now: The identity that the run needs.

    Raises:
        ConfigError: If they differ; names the differences.
    """
    unlike = [
        f"{_NAMES.get(name, name)} ({'; '.join(differences(before.get(name), now[name], name))})"
        for name in now
        if before.get(name) != now[name]
    ]
    if unlike:
        raise ConfigError(
            f"the cache {folder} is of something else: {', '.join(unlike)}; name another "
            "cache_dir, or delete that folder and make it again with flexalign cache."
        )


def _short_hash(template: Any) -> str | None:
    if template is None:
        return None
    text = json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
