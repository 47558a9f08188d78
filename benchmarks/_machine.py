"""What the benchmarks share: time and peak memory on a device, and the machine's facts."""

import ctypes
import gc
import os
import platform
import time
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


def work_seconds(device: str = "cpu") -> float:
    """Return a clock of work: CPU time, or on a GPU the wall's, once all that was queued is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def peak_growth(device: str = "cpu") -> Iterator[dict[str, float]]:
    """Fill in ``mib``: how far memory rose inside.

    On a CPU that of the resident set, by the kernel's high-water mark; on a GPU that of torch's
    allocations.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        allocated: dict[str, float] = {}
        yield allocated
        allocated["mib"] = (torch.cuda.max_memory_allocated() - held) / MIB
        return
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
