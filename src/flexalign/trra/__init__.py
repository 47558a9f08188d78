"""Training-time realignment (TrRa): a student trained towards a fused teacher, equation 6.

The names below load on first use; the modules that need no torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.trra.cache import HiddenStateCache
    from flexalign.trra.config import TrRaConfig
    from flexalign.trra.trainer import TrRaTrainer

_HOMES = {
    "HiddenStateCache": "flexalign.trra.cache",
    "TrRaConfig": "flexalign.trra.config",
    "TrRaTrainer": "flexalign.trra.trainer",
}

__all__ = ["HiddenStateCache", "TrRaConfig", "TrRaTrainer"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
