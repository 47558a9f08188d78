"""Training an adapter (SFT, DPO, TrRa), and baking a dial's setting into a plain model."""

from flexalign.inra.training.adaptation import Adaptation, adapt
from flexalign.inra.training.baking import Baking
from flexalign.inra.training.recipe import AdaptRecipe, BakeRecipe
from flexalign.inra.training.run import Outcome

__all__ = ["AdaptRecipe", "Adaptation", "BakeRecipe", "Baking", "Outcome", "adapt"]
