"""How much memory weights will take, and how much there is."""

import os
from pathlib import Path
from typing import Any

import psutil
import torch

from flexalign.errors import ConfigError
from flexalign.loading import Source
from flexalign.loading.skeleton import skeleton
from flexalign.loading.weights import tensor_infos

__all__ = ["GIB", "available_bytes", "weight_bytes"]

GIB = 2**30

_STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_ACROSS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Words of transformers for a model that is spread over the devices, and over the host."""

_CGROUP = Path("/sys/fs/cgroup")


def weight_bytes(source: Source, config: Any, dtype: torch.dtype | str) -> int:
    """Return the bytes of a model's (or an adapter's) weights once loaded.

    Args:
        source: Where it lies.
        config: Its configuration; counted from where the weights are GGUF or pickled.
        dtype: What it is loaded in; ``"auto"`` is what it is stored in.
    """
    size = _itemsize(dtype)
    try:
        infos = None if source.gguf_file else tensor_infos(source.path).values()
    except ConfigError:
        infos = None
    if infos is None:
        return _count_parameters(config) * (size or torch.float32.itemsize)
    return sum(
        torch.Size(info.shape).numel() * (size or _STORED_BYTES.get(info.dtype, 1))
        for info in infos
    )


def available_bytes(device_map: Any) -> int:
    """Return the memory that is free for weights on the devices that are named."""
    if device_map in (None, "cpu") or not torch.cuda.is_available():
        return _available_on_cpu()
    devices = range(torch.cuda.device_count())
    is_spread = device_map in _ACROSS
    if not is_spread and isinstance(device_map, str | int | torch.device):
        index = torch.device(device_map).index
        devices = range(index or 0, (index or 0) + 1)
    free = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    return free + (_available_on_cpu() if is_spread else 0)


def _itemsize(dtype: torch.dtype | str) -> int | None:
    if dtype == "auto":
        return None
    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return int(named.itemsize)


def _count_parameters(config: Any) -> int:
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def _available_on_cpu() -> int:
    free = _free_on_host()
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def _free_on_host() -> int:
    try:
        return int(psutil.virtual_memory().available)
    except (OSError, KeyError, ValueError):  # a sandbox without /proc, or with half of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
