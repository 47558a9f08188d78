"""Training a layer adapter by SFT, DPO or TrRa; the base stays as it is, and is held once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOTrainer, SFTTrainer

from flexalign.data import ThinkingTags, strip_thinking
from flexalign.errors import ConfigError
from flexalign.inra.adapter import AdapterHook
from flexalign.inra.configuration import load_weights
from flexalign.inra.modeling import InRaModel
from flexalign.models.adapters import inner_model
from flexalign.models.loading import fingerprint, load_model, load_tokenizer
from flexalign.models.pair import ModelPair
from flexalign.training.adapter_recipes import AdaptRecipe, BakeRecipe
from flexalign.training.adapter_run import Outcome, Run
from flexalign.training.callbacks import StopOnSignal
from flexalign.training.checkpoints import SealedCheckpoints
from flexalign.training.forward import HeadForm
from flexalign.training.models import Parts, Teacher, running_dtype
from flexalign.training.trainer import TrRaTrainer

# The adapter stream as a model to train: the base itself, with the adapter in front of layer 0.
#
# Trainers want one transformers model whose forward is what they train. While an adapter is in
# training, its base is that model: every pass goes through the adapter, whose parameters are listed
# among the base's and are the only ones with gradients. No second copy of the base is made; the
# base stream is the same module with the adapter passed by.

_NAME = "inra_adapter"


@contextmanager
def as_student(model: InRaModel) -> Iterator[Any]:
    """Give the base as the adapter stream to train, and put it back as it was after.

    The adapter is in float32 inside, whatever the base is in: small steps are lost in bfloat16.

    Args:
        model: Base and adapter; its `save_pretrained` saves the student, which is the adapter.
    """
    base: Any = model.base
    dtype = next(model.adapter.parameters()).dtype
    forward = base.__dict__.get("forward")
    config = base.config.get_text_config(decoder=True)
    use_cache = getattr(config, "use_cache", True)
    model.adapter.float()
    base.add_module(_NAME, model.adapter)
    base.save_pretrained = model.save_pretrained
    config.use_cache = False  # a cache of the base has no room for the adapter
    model.adapter_hook.always_on = True
    try:
        yield base
    finally:
        model.adapter_hook.always_on = False
        config.use_cache = use_cache
        delattr(base, _NAME)
        del base.save_pretrained
        # TRL puts a forward with its own loss in the place of the class's.
        base.__dict__.pop("forward", None)
        if forward is not None:
            base.forward = forward
        model.adapter.to(dtype)
        base.eval()


@contextmanager
def adapter_off(hook: AdapterHook) -> Iterator[None]:
    """Let every row pass the adapter by: inside, a student's module is its base."""
    with hook.enabled(0, 0):
        yield


# TRL's trainers for an adapter: what is saved, resumed and compared is the adapter alone.

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


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
        with adapter_off(self.inra.adapter_hook):
            chosen, rejected = super().compute_ref_log_probs(model, inputs)
        return chosen, rejected


class Adaptation(Run):
    """The training of one adapter; see :class:`~flexalign.training.adapter_run.Run`.

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
                inra.base,
                None,
                form,
                shares_student=True,
                switch=partial(adapter_off, inra.adapter_hook),
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
    run = Adaptation(recipe, data, tokenizer, models=models, command="flexalign.training.adapt")
    run.base = loaded
    return run.run(callbacks, StopOnSignal())


# Baking: a plain model that behaves as the dial at one λ, by TrRa from the two streams.

_SPLIT_SEED = 0


class Baking(Run):
    """The baking of one setting; see :class:`~flexalign.training.adapter_run.Run`.

    The student starts at the base. Its teachers are the two streams of one InRa model, so base
    and student are in memory and nothing else.
    """

    recipe: BakeRecipe

    @contextmanager
    def _trainer(self, callbacks: list[TrainerCallback]) -> Iterator[Any]:
        recipe = self.recipe
        dtype = running_dtype(self.arguments)
        inra = InRaModel.from_pretrained(recipe.base, recipe.adapter, dtype=dtype)
        inra.requires_grad_(False)
        student = load_model(recipe.base, dtype=torch.float32).requires_grad_(True)
        form = HeadForm.of(inra.base, inra.head.vocab_size)
        off = partial(adapter_off, inra.adapter_hook)
        split = self.data.train_test_split(test_size=recipe.held_out, seed=_SPLIT_SEED)
        with as_student(inra) as dial:
            parts = Parts(
                student=student,
                form=form,
                reference=Teacher(dial, None, form, shares_student=False, switch=off),
                aligned=Teacher(dial, None, form, shares_student=False),
                tokenizer=self.tokenizer,
            )
            yield TrRaTrainer(
                parts=parts,
                args=self.arguments,
                train_dataset=split["train"],
                eval_dataset=split["test"],
                processing_class=self.tokenizer,
                callbacks=callbacks,
            )

    def _measure(self, trainer: Any) -> dict[str, float]:
        """Measure the divergence to the dial on rows that were not trained on, nats per token."""
        before = [row for row in trainer.state.log_history if "eval_divergence" in row]
        after = trainer.evaluate()
        return super()._measure(trainer) | {
            "held_out_divergence": float(after["eval_loss"]),
            "held_out_divergence_of_base": float(before[0]["eval_divergence"]),
        }
