"""Flexible realignment of language models: choose how much of an alignment you want, as a λ.

The names below load on first use, so that ``import flexalign`` costs nothing.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names
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

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
