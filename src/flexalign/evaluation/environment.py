"""Where figures were measured: versions and machine, nothing that names a person or a host."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from flexalign._version import __version__

__all__ = ["environment"]

_PACKAGES = ("torch", "transformers", "peft", "math-verify", "numpy", "vllm")


def environment() -> dict[str, Any]:
    """Describe this process: flexalign, Python, packages, system, processor and accelerator."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "flexalign": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
