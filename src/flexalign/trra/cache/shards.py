"""One file of hidden states: how it is made whole, checked, and mapped into memory."""

import hashlib
import json
import mmap
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

__all__ = [
    "MappedShard",
    "dtype_name",
    "fault_of_file",
    "read_json",
    "save_tensors",
    "write_atomically",
]

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whoever else writes it at the same time.

    A failure takes the part that was written away: it would fill the disk that is full.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def save_tensors(path: Path, tensors: dict[str, Tensor], **facts: Any) -> None:
    """Write tensors as safetensors, then a note beside them with their checksum.

    Args:
        path: The file; the note has its name with ``.json`` instead.
        tensors: By name.
        **facts: More for the note.
    """
    content = save(tensors)
    write_atomically(path, content)
    note = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **facts}
    write_atomically(path.with_suffix(".json"), json.dumps(note).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if it is not there or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def fault_of_file(path: Path, note: dict[str, Any] | None) -> str | None:
    """Say what is wrong with a file that `save_tensors` wrote, or None if it is whole."""
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
    """The tensors of a safetensors file, mapped: nothing is read before it is used."""

    def __init__(self, path: Path) -> None:
        """Map a file whose checksum was found right."""
        with path.open("rb") as file:
            # A private, writable map: torch takes no read-only memory. Nothing is ever written.
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
        """Ask the system to begin reading rows; does not wait for them."""
        place = self._places[name]
        first = place.offset + start * place.row_bytes
        page = first - first % mmap.PAGESIZE
        if count and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, page, first - page + count * place.row_bytes)
