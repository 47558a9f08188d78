"""What the benchmarks share: peak memory of this process, and the machine's facts."""

import ctypes
import gc
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def resident(field: str, process: int | str = "self") -> int:
    """VmRSS, VmHWM or VmSize of a process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@contextmanager
def peak_growth() -> Iterator[dict[str, float]]:
    """Fill in ``mib``: how far the resident set rose inside, by the kernel's high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    found: dict[str, float] = {}
    yield found
    found["mib"] = (resident("VmHWM") - before) / MIB


def machine() -> dict[str, Any]:
    """The facts that a figure depends on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def unique(machines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the different ones, in the order in which they first come."""
    found: list[dict[str, Any]] = []
    for facts in machines:
        if facts not in found:
            found.append(facts)
    return found
