"""Flexible realignment of language models: choose how much of an alignment you want, as a λ.

The names below load on first use, so that ``import flexalign`` is fast.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names
from flexalign._version import __version__
from flexalign.errors import FlexAlignError

if TYPE_CHECKING:
    from flexalign.fusion import fuse
    from flexalign.generation import TwoModelDecoder
    from flexalign.inra import InRaConfig, InRaModel
    from flexalign.lambdas import Adaptive, Exit, Fixed, Ladder, Route, Schedule
    from flexalign.lora_dial import LoRADial
    from flexalign.models.interpolation import interpolate
    from flexalign.models.pair import ModelPair
    from flexalign.training import TrRaConfig, TrRaTrainer, adapt, bake, realign

_HOMES = {
    "Adaptive": "flexalign.lambdas",
    "Exit": "flexalign.lambdas",
    "Fixed": "flexalign.lambdas",
    "InRaConfig": "flexalign.inra",
    "InRaModel": "flexalign.inra",
    "Ladder": "flexalign.lambdas",
    "LoRADial": "flexalign.lora_dial",
    "ModelPair": "flexalign.models.pair",
    "Route": "flexalign.lambdas",
    "Schedule": "flexalign.lambdas",
    "TrRaConfig": "flexalign.training",
    "TrRaTrainer": "flexalign.training",
    "TwoModelDecoder": "flexalign.generation",
    "adapt": "flexalign.training",
    "bake": "flexalign.training",
    "fuse": "flexalign.fusion",
    "interpolate": "flexalign.models.interpolation",
    "realign": "flexalign.training",
}

__all__ = [
    "Adaptive",
    "Exit",
    "Fixed",
    "FlexAlignError",
    "InRaConfig",
    "InRaModel",
    "Ladder",
    "LoRADial",
    "ModelPair",
    "Route",
    "Schedule",
    "TrRaConfig",
    "TrRaTrainer",
    "TwoModelDecoder",
    "__version__",
    "adapt",
    "bake",
    "fuse",
    "interpolate",
    "realign",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
