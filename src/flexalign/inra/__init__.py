"""Inference-time realignment: a layer adapter, two streams, and a dial between them.

The names below load on first use; the modules that need no torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.inra.config import InRaConfig
    from flexalign.inra.kv import StreamCache
    from flexalign.inra.model import InRaModel
    from flexalign.inra.streams import ADAPTER, BASE, BOTH

_HOMES = {
    "ADAPTER": "flexalign.inra.streams",
    "BASE": "flexalign.inra.streams",
    "BOTH": "flexalign.inra.streams",
    "InRaConfig": "flexalign.inra.config",
    "InRaModel": "flexalign.inra.model",
    "StreamCache": "flexalign.inra.kv",
}

__all__ = ["ADAPTER", "BASE", "BOTH", "InRaConfig", "InRaModel", "StreamCache"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
