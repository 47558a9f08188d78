"""Training-time realignment (TrRa): a student trained towards a fused teacher, equation 6.

The names below load on first use; the modules that need no torch can be imported without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexalign.trra.config import TrRaConfig
    from flexalign.trra.trainer import TrRaTrainer

_HOMES = {"TrRaConfig": "flexalign.trra.config", "TrRaTrainer": "flexalign.trra.trainer"}

__all__ = ["TrRaConfig", "TrRaTrainer"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flexalign.trra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
