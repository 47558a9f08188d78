"""A training run from start to finish: resumed where it stopped, published when it is done."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from flexalign.data import data_fingerprint
from flexalign.training.adapter_card import training_card
from flexalign.training.adapter_recipes import AdaptRecipe, BakeRecipe
from flexalign.training.callbacks import StopOnSignal
from flexalign.training.card import versions_in_use
from flexalign.training.checkpoints import MANIFEST, newest_complete
from flexalign.training.output import claim_output, state_of_output
from flexalign.training.run import (
    drop_broken,
    one_process,
    publish,
    train_onwards,
    trainer_state,
)


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        output: The folder of what was trained.
        steps: Optimizer steps.
        measures: What was measured: the last logged loss and, of a baking, divergences.
    """

    output: Path
    steps: int
    measures: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return {"output": str(self.output), "steps": self.steps, **self.measures}


class Run(ABC):
    """A recipe with its data, ready to run or to go on where it stopped.

    Making one decides whether the output folder may be used, before anything expensive.

    Args:
        recipe: What to do.
        data: The training data as it is trained on.
        tokenizer: The base's.
        models: Fingerprints of all models and adapters that take part.
        command: The command line, for the model card.
        say: Is given one line at a time for people.

    Raises:
        ConfigError: If the folder holds another run.
    """

    def __init__(
        self,
        recipe: AdaptRecipe | BakeRecipe,
        data: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        models: Sequence[str | None],
        command: str,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.recipe, self.data, self.tokenizer = recipe, data, tokenizer
        self.arguments = recipe.training_arguments()
        self._command, self._say = command, say
        self._identity = recipe.identity() | {
            "task": type(self).__name__,
            "models": list(models),
            "data": data_fingerprint(data),
        }
        self.output = Path(recipe.output)
        self.state = state_of_output(self.output, self._identity)

    def run(self, callbacks: Sequence[TrainerCallback], stop: StopOnSignal) -> Outcome:
        """Train what is not trained yet, and return what came of it.

        Args:
            callbacks: The trainer's (progress).
            stop: Ends training early on a signal.

        Raises:
            Stopped: If it did.
            CheckpointError: If the output folder cannot be written to.
        """
        if self.state != "done":
            self._train(callbacks, stop)
        manifest = json.loads((self.output / MANIFEST).read_text(encoding="utf-8"))
        return Outcome(self.output, manifest["steps"], manifest["measures"])

    def _train(self, callbacks: Sequence[TrainerCallback], stop: StopOnSignal) -> None:
        found = newest_complete(self.output)
        with one_process() as is_first:
            if is_first:
                claim_output(self.output, self._identity)
                drop_broken(found, self._say)
                if found.path is not None:
                    self._say(f"going on from {found.path}")
        with self._trainer([stop, *callbacks]) as trainer:
            checkpoint = train_onwards(trainer, found, stop)
            measures = self._measure(trainer)
        with one_process() as is_first:
            if is_first:
                self._publish(checkpoint, measures)

    def _publish(self, checkpoint: Path, measures: dict[str, float]) -> None:
        facts = {
            "steps": trainer_state(checkpoint)["global_step"],
            "measures": measures,
            "models": self._identity["models"],
            "data": self._identity["data"],
        }
        publish(
            checkpoint,
            self.output,
            training_card(self.recipe, command=self._command, facts=facts),
            **facts,
            recipe=self.recipe.to_tree(),
            command=self._command,
            versions=versions_in_use(),
        )

    @abstractmethod
    @contextmanager
    def _trainer(self, callbacks: list[TrainerCallback]) -> Iterator[Any]:
        """Load the models and give their trainer."""

    def _measure(self, trainer: Any) -> dict[str, float]:
        """Measure what came of it."""
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {"loss": float(losses[-1])} if losses else {}
