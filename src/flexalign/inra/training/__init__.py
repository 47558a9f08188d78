"""Training an adapter (SFT, DPO, TrRa), and baking a dial's setting into a plain model.

The names below load on first use; the modules that need no torch can be imported without it.
"""

from typing import TYPE_CHECKING

from flexalign._lazy import lazy_names

if TYPE_CHECKING:
    from flexalign.inra.training.adaptation import Adaptation, adapt
    from flexalign.inra.training.baking import Baking
    from flexalign.inra.training.recipe import AdaptRecipe, BakeRecipe
    from flexalign.inra.training.run import Outcome

_HOMES = {
    "AdaptRecipe": "flexalign.inra.training.recipe",
    "Adaptation": "flexalign.inra.training.adaptation",
    "BakeRecipe": "flexalign.inra.training.recipe",
    "Baking": "flexalign.inra.training.baking",
    "Outcome": "flexalign.inra.training.run",
    "adapt": "flexalign.inra.training.adaptation",
}

__all__ = ["AdaptRecipe", "Adaptation", "BakeRecipe", "Baking", "Outcome", "adapt"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
