"""Training a layer adapter by SFT, DPO or TrRa; the base stays as it is, and is held once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from flexalign.data import ThinkingTags, strip_thinking
from flexalign.errors import ConfigError
from flexalign.inra.model import InRaModel
from flexalign.inra.training.recipe import AdaptRecipe
from flexalign.inra.training.run import Outcome, Run
from flexalign.inra.training.student import adapter_off, as_student
from flexalign.inra.training.trainers import (
    AdapterDPOTrainer,
    AdapterSFTTrainer,
    AdapterTrRaTrainer,
)
from flexalign.loading import fingerprint, load_model, load_tokenizer
from flexalign.pairing import ModelPair
from flexalign.pairing.adapters import inner_model
from flexalign.trra.assembly import Parts
from flexalign.trra.callbacks import StopOnSignal
from flexalign.trra.forward import HeadForm
from flexalign.trra.parts import running_dtype
from flexalign.trra.teachers import Teacher

__all__ = ["Adaptation", "adapt"]


class Adaptation(Run):
    """The training of one adapter; see :class:`~flexalign.inra.training.run.Run`.

    Attributes:
        base: A loaded base in the place of the recipe's, which then only names it.
    """

    recipe: AdaptRecipe
    base: PreTrainedModel | None = None

    @contextmanager
    def _trainer(self, callbacks: list[TrainerCallback]) -> Iterator[Any]:
        inra = self._load()
        tags = ThinkingTags.of(self.tokenizer)
        inra.inra_config = replace(
            inra.inra_config, thinking_tags=(tags.open, tags.close), calibration=None
        )
        options: dict[str, Any] = {
            "args": self.arguments,
            "train_dataset": self.data,
            "processing_class": self.tokenizer,
            "callbacks": callbacks,
        }
        parts = self._parts(inra) if self.recipe.method == "trra" else None
        with as_student(inra) as student:
            if parts is not None:
                yield AdapterTrRaTrainer(inra, parts=parts, **options)
            elif self.recipe.method == "dpo":
                yield AdapterDPOTrainer(inra, model=student, **options)
            else:
                yield AdapterSFTTrainer(inra, model=student, **options)

    def _load(self) -> InRaModel:
        recipe = self.recipe
        base: Any = recipe.base if self.base is None else self.base
        loading: dict[str, Any] = (
            {"dtype": running_dtype(self.arguments)} if self.base is None else {}
        )
        if recipe.adapter is not None:
            return InRaModel.from_pretrained(base, recipe.adapter, **loading)
        model = InRaModel.create(base, adapter_layers=recipe.adapter_layers, **loading)
        model.inra_config = replace(model.inra_config, base=recipe.base)
        return model

    def _parts(self, inra: InRaModel) -> Parts:
        """Return the student and its teachers: the base stream, and one model more."""
        aligned = load_model(str(self.recipe.aligned), dtype=running_dtype(self.arguments))
        aligned.eval().requires_grad_(False)
        pair = ModelPair.of(inra.base, aligned, self.tokenizer)
        form = HeadForm.of(inra.base, pair.vocab_size)
        other = HeadForm.of(inner_model(aligned), pair.vocab_size)
        return Parts(
            student=inra.base,
            form=form,
            reference=Teacher(
                inra.base, None, form, shares_student=True, switch=partial(adapter_off, inra.entry)
            ),
            aligned=Teacher(aligned, None, other, shares_student=False),
            tokenizer=self.tokenizer,
        )


def adapt(
    base: str | Path | PreTrainedModel,
    data: Dataset,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> Outcome:
    """Train an adapter for a base model and save it; a run that was stopped goes on.

    Example::

        adapt("miniature", answers, "out/fast", strip_thinking=True, training={"max_steps": 200})
        model = InRaModel.from_pretrained("miniature", "out/fast")

    Args:
        base: A known name, a folder, or a loaded model, which is afterwards as it was.
        data: Prompts with responses (`prompt` and `completion`), or with `chosen` and `rejected`.
        output: The adapter's folder.
        tokenizer: The base's; needed with a loaded model.
        callbacks: As transformers' ``Trainer`` takes them.
        **settings: The other fields of `AdaptRecipe`: `method`, `strip_thinking`, `training`, ….

    Raises:
        ConfigError: If a setting is unknown or out of its range, or `output` holds another run.
        DataError: If nothing is left of the data without its thinking.
        UnsupportedModelError: If the base cannot have an adapter.
    """
    loaded = base if isinstance(base, PreTrainedModel) else None
    name = str(base) if loaded is None else str(loaded.config._name_or_path or type(base).__name__)
    settings = {("lambda" if key == "lam" else key): value for key, value in settings.items()}
    recipe = AdaptRecipe.parse(
        {"base": name, "data": "(given in memory)", "output": str(output), **settings}
    )
    if tokenizer is None:
        if loaded is not None:
            raise ConfigError("the base is a loaded model; give its tokenizer too.")
        tokenizer = load_tokenizer(name)
    if recipe.strip_thinking:
        data = strip_thinking(data, ThinkingTags.of(tokenizer))
    models = [fingerprint(name if loaded is None else loaded)]
    models += [fingerprint(recipe.aligned)] if recipe.aligned else []
    run = Adaptation(
        recipe, data, tokenizer, models=models, command="flexalign.inra.training.adapt"
    )
    run.base = loaded
    return run.run(callbacks, StopOnSignal())
