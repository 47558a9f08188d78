"""TRL's trainers for an adapter: what is saved, resumed and compared is the adapter alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from trl import DPOTrainer, SFTTrainer

from flexalign.errors import ConfigError
from flexalign.inra.folder import load_weights
from flexalign.inra.model import InRaModel
from flexalign.inra.training.student import adapter_off
from flexalign.trra.checkpoints import SealedCheckpoints
from flexalign.trra.trainer import TrRaTrainer

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["AdapterDPOTrainer", "AdapterSFTTrainer", "AdapterTrRaTrainer"]


class _AdapterTraining(_Trainer):  # type: ignore[misc]
    """A mix-in: a checkpoint holds the adapter, and going on loads it from there."""

    def __init__(self, inra: InRaModel, **options: Any) -> None:
        """Join a trainer and the adapter that it trains.

        Args:
            inra: Base and adapter, inside `as_student`.
            **options: As the trainer takes them.
        """
        self.inra = inra
        super().__init__(**options)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self.inra.adapter, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.inra.adapter, Path(str(self.state.best_model_checkpoint)))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: the finished folder gets its own."""


class AdapterSFTTrainer(_AdapterTraining, SealedCheckpoints, SFTTrainer):  # type: ignore[misc]
    """Supervised fine-tuning of an adapter: TRL's, on the adapter stream."""


class AdapterTrRaTrainer(_AdapterTraining, TrRaTrainer):
    """TrRa of an adapter: its reference is the base stream of the same model."""


class AdapterDPOTrainer(_AdapterTraining, SealedCheckpoints, DPOTrainer):  # type: ignore[misc]
    """Direct preference optimisation of an adapter against the base stream.

    The reference's log-probabilities are computed once, before training, by the same module with
    the adapter passed by: no second model is held or loaded, whatever state the adapter is in.
    """

    def __init__(self, inra: InRaModel, **options: Any) -> None:
        """As `_AdapterTraining`.

        Raises:
            ConfigError: If the reference is to be computed otherwise.
        """
        if not options["args"].precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs=False would load a second base as the reference; the "
                "base stream's log-probabilities are computed beforehand, so leave it out."
            )
        super().__init__(inra, **options)

    def compute_ref_log_probs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of both responses under the base stream, each ``(B,)``."""
        with adapter_off(self.inra.entry):
            chosen, rejected = super().compute_ref_log_probs(model, inputs)
        return chosen, rejected
