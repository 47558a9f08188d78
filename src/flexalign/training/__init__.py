"""Training: TrRa (equation 6), layer adapters, and plain models of one setting of λ (baking).

`flexalign.realign`, `adapt` and `bake` run a recipe from start to finish. The names below are
imported on first use. Modules that do not need torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.training.adapter import Adaptation, Baking, adapt, bake
    from flexalign.training.cache import fill_cache
    from flexalign.training.config import TrRaConfig
    from flexalign.training.events import Events, StepObserver
    from flexalign.training.hidden_cache import HiddenStateCache
    from flexalign.training.plan import TrainingPlan
    from flexalign.training.realignment import Realignment, realign
    from flexalign.training.recipes import AdaptRecipe, BakeRecipe, RealignRecipe, WatchSettings
    from flexalign.training.run import Outcome, Stopped
    from flexalign.training.trainer import TrRaTrainer

_HOMES = {
    "AdaptRecipe": "flexalign.training.recipes",
    "Adaptation": "flexalign.training.adapter",
    "BakeRecipe": "flexalign.training.recipes",
    "Baking": "flexalign.training.adapter",
    "Events": "flexalign.training.events",
    "HiddenStateCache": "flexalign.training.hidden_cache",
    "Outcome": "flexalign.training.run",
    "TrainingPlan": "flexalign.training.plan",
    "RealignRecipe": "flexalign.training.recipes",
    "Realignment": "flexalign.training.realignment",
    "StepObserver": "flexalign.training.events",
    "Stopped": "flexalign.training.run",
    "TrRaConfig": "flexalign.training.config",
    "TrRaTrainer": "flexalign.training.trainer",
    "WatchSettings": "flexalign.training.recipes",
    "adapt": "flexalign.training.adapter",
    "bake": "flexalign.training.adapter",
    "fill_cache": "flexalign.training.cache",
    "realign": "flexalign.training.realignment",
}

__all__ = [
    "AdaptRecipe",
    "Adaptation",
    "BakeRecipe",
    "Baking",
    "Events",
    "HiddenStateCache",
    "Outcome",
    "RealignRecipe",
    "Realignment",
    "StepObserver",
    "Stopped",
    "TrRaConfig",
    "TrRaTrainer",
    "TrainingPlan",
    "WatchSettings",
    "adapt",
    "bake",
    "fill_cache",
    "realign",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
