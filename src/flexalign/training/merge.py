"""Baking a LoRA dial: its low-rank terms at one λ are added to the base's weights.

Nothing is trained, so no data is read. The result equals the dial at that λ up to the rounding of
the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign._storage import following_umask, write_text
from flexalign.errors import ConfigError, UnsupportedModelError, as_input_errors
from flexalign.generation.dial_config import require_base
from flexalign.lambdas import require_range
from flexalign.lora_dial.configuration import ADAPTER_FILE, LoRADialConfig, check_folder
from flexalign.lora_dial.modeling import LoRADial
from flexalign.models.compatibility import examine
from flexalign.models.sources import resolve_adapter
from flexalign.models.weights import fingerprint_file
from flexalign.training.card import model_card, versions_in_use
from flexalign.training.checkpoints import seal, writing
from flexalign.training.events import Events
from flexalign.training.output import State, claim_output, state_of_output
from flexalign.training.plan import TrainingPlan
from flexalign.training.recipes import BakeRecipe
from flexalign.training.run import Outcome, one_process

_OWN_KEYS = ("base", "adapter", "lambda", "output")
"""The keys of a recipe that merges; all others are for training."""


def is_lora(adapter: str) -> bool:
    """Return whether an adapter's folder is that of a LoRA; if not, it is a layer adapter's."""
    folder = resolve_adapter(adapter)
    names = (ADAPTER_FILE, LoRADialConfig.CONFIG_FILE)
    return any((folder / name).is_file() for name in names)


@dataclass(frozen=True)
class Merge:
    """The merge of a LoRA dial into its base at one λ.

    Attributes:
        recipe: Base, adapter, λ and output.
        command: The command line, for the model card.
        facts: The fingerprints of base and adapter.
        state: The state of the output folder.
    """

    recipe: BakeRecipe
    command: str
    facts: dict[str, Any]
    state: State
    rounds: Sequence[Any] = (None,)

    @classmethod
    def of(
        cls, recipe: BakeRecipe, lambda_range: tuple[float, float] | None, command: str
    ) -> "Merge":
        """Read and check the recipe, the base and the adapter, without weights.

        Raises:
            ConfigError: If the recipe has keys of a training, or the output folder holds another
                run.
            LambdaError: If λ lies outside the range, by default the adapter's own.
            CheckpointError: If the adapter's folder is damaged.
            PairMismatchError: If the adapter was made for another base.
            UnsupportedModelError: If the base is an adapter itself.
        """
        keys = recipe.keys()
        for key, name in keys.items():
            is_given = getattr(recipe, name) != type(recipe).model_fields[name].get_default(
                call_default_factory=True
            )
            if key not in _OWN_KEYS and is_given:
                raise ConfigError(
                    f"{key} is for a layer adapter, whose setting is trained into a model; "
                    f"{recipe.adapter} is a LoRA, which is merged without training, so leave it "
                    "out."
                )

        with as_input_errors():
            folder = resolve_adapter(recipe.adapter)
            settings = check_folder(folder)
            base = examine(recipe.base)
            if base.kind == "adapter":
                raise UnsupportedModelError(
                    f"the base {recipe.base} is a PEFT adapter; give the base that {recipe.adapter} "
                    "was trained on."
                )
            if base.kind != "gguf" and base.fingerprint is not None:
                require_base(settings, base.fingerprint, recipe.base, folder)
            asked = [(f"λ={recipe.lam:g}", recipe.schedule)]
            require_range(
                lambda_range or settings.lambda_range, asked, f"the adapter {recipe.adapter}"
            )
            prints = [base.fingerprint, fingerprint_file(folder / settings.WEIGHTS_FILE)]

        facts = {"task": "Merge", "models": prints}
        identity = {"lambda": recipe.lam, **facts}
        return cls(recipe, command, facts, state_of_output(Path(recipe.output), identity))

    def plan(self) -> TrainingPlan:
        """Return the plan: nothing is trained."""
        return TrainingPlan({**self.recipe.to_tree(), "steps": 0, "output_state": self.state}, ())

    def run(self, events: Events) -> Outcome:
        """Merge, unless the folder holds the result already, and return the outcome.

        Raises:
            CheckpointError: If the output folder cannot be written to.
        """
        output = Path(self.recipe.output)
        events.begin(self)
        with one_process() as is_first:
            if is_first and self.state != "done":
                claim_output(output, {"lambda": self.recipe.lam, **self.facts})
                self._write(output)
        return Outcome(output, steps=0)

    def _write(self, output: Path) -> None:
        recipe = self.recipe
        dial = LoRADial.from_pretrained(recipe.base, recipe.adapter)
        if dial.tokenizer is not None:
            dial.dial_config.bind(dial.tokenizer)

        with writing("the model", output, remains="nothing is lost"):
            with following_umask(output):
                dial.merged(recipe.lam).save_pretrained(output)
            if dial.tokenizer is not None:
                dial.tokenizer.save_pretrained(output)
            card = model_card(recipe, command=self.command, facts=self.facts)
            write_text(output / "README.md", card)
            seal(
                output,
                steps=0,
                measures={},
                **self.facts,
                recipe=recipe.to_tree(),
                command=self.command,
                versions=versions_in_use(),
            )
