"""Inference-time realignment (InRa): a layer adapter, two streams, and λ between them.

The names below are imported on first use. Modules that do not need torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.generation.stream_cache import BOTH, StreamCache
    from flexalign.inra.configuration import InRaConfig
    from flexalign.inra.modeling import ADAPTER, BASE, InRaModel

_HOMES = {
    "ADAPTER": "flexalign.inra.modeling",
    "BASE": "flexalign.inra.modeling",
    "BOTH": "flexalign.generation.stream_cache",
    "InRaConfig": "flexalign.inra.configuration",
    "InRaModel": "flexalign.inra.modeling",
    "StreamCache": "flexalign.generation.stream_cache",
}

__all__ = ["ADAPTER", "BASE", "BOTH", "InRaConfig", "InRaModel", "StreamCache"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
