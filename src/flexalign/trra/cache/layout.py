"""The cache's folder: its files, how many bytes they take, and which process makes which."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexalign.errors import ConfigError

__all__ = [
    "CLAIMS",
    "HEADS",
    "MANIFEST",
    "OWNER",
    "SHARD_BYTES",
    "Form",
    "claim",
    "free_bytes",
    "hidden_width",
    "plan_shards",
    "require_room",
    "shard_name",
]

OWNER = "cache.json"
"""What the cache is of; written first."""

MANIFEST = "manifest.json"
"""All checksums and counts; written last, so a cache that has one was whole."""

HEADS = "heads.safetensors"

CLAIMS = ".claims"
"""An empty file on whose bytes processes hold locks: one byte for each file that is made."""

SHARD_BYTES = 128 * 2**20
"""Hidden states in one file, at most; a document is never split."""

_GIB = 2**30


def hidden_width(config: Any) -> int:
    """Width of the hidden state that a model's head takes, from its configuration."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


@dataclass(frozen=True)
class Form:
    """What a cache's size depends on, known before any weight is loaded.

    Attributes:
        widths: Of the two models' hidden states.
        vocab_size: Tokens that both heads score.
        shared_head: Whether the pair has one head, as a base and an adapter on it have.
        dtype: What hidden states are stored in.
        head_dtype: What heads are stored in: as the models are loaded.
    """

    widths: tuple[int, int]
    vocab_size: int
    shared_head: bool
    dtype: torch.dtype
    head_dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one response token: both hidden states."""
        return sum(self.widths) * self.dtype.itemsize

    @property
    def head_bytes(self) -> int:
        """Bytes of the heads."""
        widths = self.widths[:1] if self.shared_head else self.widths
        return self.vocab_size * sum(widths) * self.head_dtype.itemsize


def shard_name(index: int) -> str:
    """Name of a shard's file."""
    return f"shard-{index:05d}.safetensors"


def plan_shards(counts: Sequence[int], token_bytes: int, shard_bytes: int) -> list[range]:
    """Cut documents, in order, into shards of at most `shard_bytes`, or of one document.

    Args:
        counts: Kept positions of each document.
        token_bytes: Bytes of one position: both hidden states.
        shard_bytes: The most that a shard may hold.

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
    """Compare what a cache still takes with the disk's free space, and put it into words.

    Args:
        folder: The cache's; it need not exist.
        size: Bytes that are still to be written.
        anyway: Go on even if they do not fit.

    Raises:
        ConfigError: If they do not fit.
    """
    free = free_bytes(folder)
    need = f"the cache takes {size / _GIB:.3g} GiB more, and {free / _GIB:.3g} GiB are free"
    if size > free and not anyway:
        raise ConfigError(
            f"{need} in {folder}; name another cache_dir, store it in bfloat16 (--dtype), take "
            "fewer rows or a smaller max_length, or write it anyway with --anyway."
        )
    return need


def free_bytes(folder: Path) -> int:
    """Free space of the disk that a folder is on, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def claim(folder: Path, index: int) -> Iterator[bool]:
    """Try to be the one process that makes a file; the claim ends with the block or the process.

    Where the file system has no locks, every claim succeeds: files are still made whole or not at
    all, but two processes may make the same one.

    Args:
        folder: The cache's.
        index: Which file: 0 for the heads, k + 1 for shard k.

    Yields:
        Whether nobody else holds it.
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
