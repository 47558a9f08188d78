"""Flexible realignment of language models: choose how much of an alignment you want, as a λ.

The names below load on first use, so that ``import flexalign`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexalign._version import __version__
from flexalign.errors import FlexAlignError

if TYPE_CHECKING:
    from flexalign.decoding import TwoModelDecoder, interpolate
    from flexalign.fusion import fuse
    from flexalign.inra import InRaConfig, InRaModel
    from flexalign.pairing import ModelPair
    from flexalign.policies import Adaptive, Fixed, Route
    from flexalign.schedules import Schedule
    from flexalign.trra import TrRaConfig, TrRaTrainer

_HOMES = {
    "Adaptive": "flexalign.policies",
    "Fixed": "flexalign.policies",
    "InRaConfig": "flexalign.inra",
    "InRaModel": "flexalign.inra",
    "ModelPair": "flexalign.pairing",
    "Route": "flexalign.policies",
    "Schedule": "flexalign.schedules",
    "TrRaConfig": "flexalign.trra",
    "TrRaTrainer": "flexalign.trra",
    "TwoModelDecoder": "flexalign.decoding",
    "fuse": "flexalign.fusion",
    "interpolate": "flexalign.decoding",
}

__all__ = [
    "Adaptive",
    "Fixed",
    "FlexAlignError",
    "InRaConfig",
    "InRaModel",
    "ModelPair",
    "Route",
    "Schedule",
    "TrRaConfig",
    "TrRaTrainer",
    "TwoModelDecoder",
    "__version__",
    "fuse",
    "interpolate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flexalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
