"""Training: TrRa (equation 6), layer adapters, and baking a dial's setting into a plain model.

The names below load on first use; the modules that need no torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.training.adapter import Adaptation, Baking, adapt
    from flexalign.training.adapter_recipes import AdaptRecipe, BakeRecipe
    from flexalign.training.adapter_run import Outcome
    from flexalign.training.config import TrRaConfig
    from flexalign.training.hidden_cache import HiddenStateCache
    from flexalign.training.trainer import TrRaTrainer

_HOMES = {
    "AdaptRecipe": "flexalign.training.adapter_recipes",
    "Adaptation": "flexalign.training.adapter",
    "BakeRecipe": "flexalign.training.adapter_recipes",
    "Baking": "flexalign.training.adapter",
    "HiddenStateCache": "flexalign.training.hidden_cache",
    "Outcome": "flexalign.training.adapter_run",
    "TrRaConfig": "flexalign.training.config",
    "TrRaTrainer": "flexalign.training.trainer",
    "adapt": "flexalign.training.adapter",
}

__all__ = [
    "AdaptRecipe",
    "Adaptation",
    "BakeRecipe",
    "Baking",
    "HiddenStateCache",
    "Outcome",
    "TrRaConfig",
    "TrRaTrainer",
    "adapt",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
