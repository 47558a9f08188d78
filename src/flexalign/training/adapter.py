"""Training a layer adapter by SFT, DPO or TrRa, and a plain model of one setting of λ (baking).

The base does not change, and is in memory once. The entry points are `adapt` and `bake`, at the end
of the file: each reads the recipe, reads the files that it names, makes the run, and trains.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTTrainer

from flexalign.data import (
    Lengths,
    ThinkingTags,
    load_preferences,
    measure_lengths,
    strip_thinking,
)
from flexalign.data.files import PLACE
from flexalign.data.rendering import rendering_record
from flexalign.errors import ConfigError, UnsupportedModelError, as_input_errors
from flexalign.generation.dial_config import require_base
from flexalign.inra.adapter import AdapterHook, decoder_layers
from flexalign.inra.configuration import (
    WEIGHTS_FILE,
    InRaConfig,
    check_folder,
    load_weights,
)
from flexalign.inra.modeling import InRaModel
from flexalign.lambdas import require_forward, require_range
from flexalign.models.adapters import inner_model
from flexalign.models.compatibility import (
    ModelFacts,
    RenamedToken,
    describe_renamed,
    examine,
    examine_pair,
)
from flexalign.models.hub import check_before_download, downloads_wait, fetch_weights
from flexalign.models.loading import fingerprint, load_model, skeleton
from flexalign.models.pair import ModelPair
from flexalign.models.sources import resolve_adapter
from flexalign.models.weights import fingerprint_file
from flexalign.training.checkpoints import SealedCheckpoints
from flexalign.training.events import Events
from flexalign.training.forward import HeadForm
from flexalign.training.inputs import read_traces, settle_template
from flexalign.training.memory import Sizes
from flexalign.training.merge import Merge, is_lora
from flexalign.training.models import Teacher, TrainingModels, running_dtype
from flexalign.training.plan import TrainingPlan, plan_memory, plan_steps, sample_rows
from flexalign.training.recipes import IDLE_GATE, AdaptRecipe, BakeRecipe, Recipe
from flexalign.training.rows import RenderedPreferences, RenderedRows
from flexalign.training.run import Outcome, Round, RunOptions, TrainingRun
from flexalign.training.trainer import TrRaTrainer

# The adapter stream as a model to train: the base, with the adapter in front of layer 0.
#
# A trainer takes one transformers model and trains its forward pass. During training, the base is
# that model: each pass runs through the adapter. The adapter's parameters are registered on the
# base, and only they have gradients. There is no second copy of the base: the base stream is the
# same module, run without the adapter.

_NAME = "inra_adapter"


@contextmanager
def as_student(model: InRaModel) -> Iterator[Any]:
    """Yield the base as the adapter stream to train; restore it on exit.

    Inside, the adapter is in float32, independent of the base's dtype: bfloat16 would round small
    optimizer steps away.

    Args:
        model: Base and adapter. Inside, the base's `save_pretrained` is this model's, which saves
            the adapter only.
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
        # TRL replaces the forward of the model by one with its own loss.
        base.__dict__.pop("forward", None)
        if forward is not None:
            base.forward = forward
        model.adapter.to(dtype)
        base.eval()


@contextmanager
def adapter_off(hook: AdapterHook) -> Iterator[None]:
    """Run all rows without the adapter: inside, the student's module computes the base."""
    with hook.enabled(0, 0):
        yield


# TRL's trainers for an adapter: only the adapter is saved, resumed and compared.

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class _AdapterTraining(_Trainer):  # type: ignore[misc]
    """A mix-in for trainers: checkpoints hold the adapter, and resuming loads it from them."""

    def __init__(self, inra: InRaModel, **options: Any) -> None:
        """Create the trainer of an adapter.

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
        """Do nothing: the finished folder gets a card of its own."""


class AdapterSFTTrainer(_AdapterTraining, RenderedRows, SealedCheckpoints, SFTTrainer):  # type: ignore[misc]
    """TRL's supervised fine-tuning, of the adapter stream."""


class AdapterTrRaTrainer(_AdapterTraining, TrRaTrainer):
    """TrRa of an adapter. The reference is the base stream of the same model."""


class AdapterDPOTrainer(_AdapterTraining, RenderedPreferences, SealedCheckpoints, DPOTrainer):  # type: ignore[misc]
    """Direct preference optimisation of an adapter against the base stream.

    The reference's log-probabilities are computed once, before training, by the same module without
    the adapter. No second model is loaded, also where training continues from a trained adapter.
    """

    def __init__(self, inra: InRaModel, **options: Any) -> None:
        """Create the trainer; the arguments are those of `_AdapterTraining`.

        Raises:
            ConfigError: If ``precompute_ref_log_probs`` is off.
        """
        if not options["args"].precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs=False would load a second base as the reference; the "
                "base stream's log-probabilities are computed beforehand, so leave it out."
            )
        super().__init__(inra, **options)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Compute them once; of several processes all read the file that the first one writes.

        TRL keeps that file beside the data. Rows in memory have a temporary folder in every process,
        where the others would look for it in vain; here it lies in the output folder for a while.
        """
        if self.accelerator.num_processes == 1:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        folder = Path(self.args.output_dir) / "reference-log-probabilities"
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed in here
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()

        dataset._get_cache_file_path = lambda fingerprint: str(folder / f"{name}.arrow")
        computed = super()._precompute_ref_logps(dataset, name, batch_size)
        rows = Dataset(InMemoryTable(computed.with_format("arrow")[:]))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(folder)
        return rows

    def compute_ref_log_probs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of both responses under the base stream, each ``(B,)``."""
        with adapter_off(self.inra.adapter_hook):
            chosen, rejected = super().compute_ref_log_probs(model, inputs)
        return chosen, rejected


# The two runs.


class _AdapterRun(TrainingRun):
    """A `TrainingRun` that trains or uses a layer adapter.

    Attributes:
        task: The kind of run, as `run.json` names it.
    """

    task: str

    def _describe_models(self, prints: list[str | None]) -> dict[str, Any]:
        return {"task": self.task, "models": prints}


class Adaptation(_AdapterRun):
    """The `TrainingRun` of one adapter.

    Attributes:
        base: A loaded base. If set, the recipe's `base` is only its name.
    """

    task = "Adaptation"
    recipe: AdaptRecipe
    base: PreTrainedModel | None = None

    @contextmanager
    def _trainer(self, callbacks: list[TrainerCallback], round_: Round) -> Iterator[Any]:
        inra = self._load()

        # What an earlier calibration found does not hold for the newly trained weights.
        tags = ThinkingTags.of(self.tokenizer)
        inra.inra_config = replace(
            inra.inra_config,
            thinking_tags=(tags.open, tags.close),
            calibration=None,
            rendering=self._rendering(),
        )

        options: dict[str, Any] = {
            "args": self.recipe.training_arguments(),
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

    def _rendering(self) -> dict[str, Any]:
        """What prompts were rendered with: the template, its arguments, and a system message."""
        system = {} if self.recipe.system is None else {"system": self.recipe.system}
        return rendering_record(self.tokenizer) | system

    def _load(self) -> InRaModel:
        recipe = self.recipe
        base: Any = recipe.base if self.base is None else self.base
        loading: dict[str, Any] = (
            {"dtype": running_dtype(self.recipe.arguments)} if self.base is None else {}
        )
        if recipe.adapter is not None:
            return InRaModel.from_pretrained(base, recipe.adapter, **loading)
        model = InRaModel.create(base, adapter_layers=recipe.adapter_layers, **loading)
        model.inra_config = replace(model.inra_config, base=recipe.base)
        return model

    def _parts(self, inra: InRaModel) -> TrainingModels:
        """Return the student and its two teachers: the base stream, and the aligned model."""
        aligned = load_model(str(self.recipe.aligned), dtype=running_dtype(self.recipe.arguments))
        aligned.eval().requires_grad_(False)
        pair = ModelPair.of(inra.base, aligned, self.tokenizer)

        form = HeadForm.of(inra.base, pair.vocab_size)
        aligned_form = HeadForm.of(inner_model(aligned), pair.vocab_size)
        return TrainingModels(
            student=inra.base,
            form=form,
            reference=Teacher(
                inra.base,
                None,
                form,
                shares_student=True,
                switch=partial(adapter_off, inra.adapter_hook),
            ),
            aligned=Teacher(aligned, None, aligned_form, shares_student=False),
            tokenizer=self.tokenizer,
        )


_SPLIT_SEED = 0


class Baking(_AdapterRun):
    """The `TrainingRun` of a plain model that behaves as base and adapter do at one λ (TrRa).

    The student starts at the base. Its teachers are the two streams of one InRa model, so only
    base, adapter and student are in memory.
    """

    task = "Baking"
    recipe: BakeRecipe
    measures_after = True

    @contextmanager
    def _trainer(self, callbacks: list[TrainerCallback], round_: Round) -> Iterator[Any]:
        recipe = self.recipe
        dtype = running_dtype(recipe.arguments)
        inra = InRaModel.from_pretrained(recipe.base, recipe.adapter, dtype=dtype)
        inra.requires_grad_(False)
        student = load_model(recipe.base, dtype=torch.float32).requires_grad_(True)

        form = HeadForm.of(inra.base, inra.head.vocab_size)
        off = partial(adapter_off, inra.adapter_hook)

        split = self.data.train_test_split(test_size=recipe.held_out, seed=_SPLIT_SEED)
        with as_student(inra) as dial:
            parts = TrainingModels(
                student=student,
                form=form,
                reference=Teacher(dial, None, form, shares_student=False, switch=off),
                aligned=Teacher(dial, None, form, shares_student=False),
                tokenizer=self.tokenizer,
            )
            yield TrRaTrainer(
                parts=parts,
                args=recipe.training_arguments(),
                train_dataset=split["train"],
                eval_dataset=split["test"],
                processing_class=self.tokenizer,
                callbacks=callbacks,
            )

    def _measure(self, checkpoint: Path, trainer: Any) -> dict[str, float]:
        """Measure the divergence to the dial on rows that were not trained on, nats per token."""
        before = [row for row in trainer.state.log_history if "eval_divergence" in row]
        after = trainer.evaluate()
        return super()._measure(checkpoint, trainer) | {
            "held_out_divergence": float(after["eval_loss"]),
            "held_out_divergence_of_base": float(before[0]["eval_divergence"]),
        }


# The models and the data of a recipe, read and checked before any weight is loaded.


@dataclass(frozen=True)
class Base:
    """The base of a run with an adapter, as read without its weights.

    Attributes:
        config: The base's configuration.
        tokenizer: The base's tokenizer.
        prints: Fingerprints of all models and adapters of the run.
        sizes: Number of parameters of the base, and of those that are trained.
        others: Number of parameters of the other models in memory.
        renamed: The special tokens that were read by id.
    """

    config: Any
    tokenizer: PreTrainedTokenizerBase
    prints: list[str | None]
    sizes: Sizes
    others: int = 0
    renamed: tuple[RenamedToken, ...] = ()


def _read_adaptation(recipe: AdaptRecipe) -> Base:
    """Read the base, the adapter and the aligned model of an `AdaptRecipe`, without weights.

    Raises:
        ConfigError: If an adapter's folder is damaged or was made for another base.
        UnsupportedModelError: If the base cannot have an adapter.
        PairMismatchError: If the aligned model does not fit the base.
    """
    with as_input_errors():
        base = _examine_base(recipe.base)
        layers = recipe.adapter_layers
        if recipe.adapter is not None:
            settings = _adapter_settings(recipe.base, recipe.adapter, base)
            settings.bind(base.tokenizer)
            layers = settings.adapter_layers
        total, layer = _count(base.config, base.name)
        others, prints = 0, [base.fingerprint]
        renamed: tuple[RenamedToken, ...] = ()
        if recipe.adapter is not None:
            prints.append(_fingerprint_adapter(recipe.adapter))
        if recipe.aligned is not None:
            facts = examine_pair(recipe.base, recipe.aligned, by_id=recipe.by_id)
            facts.require_fit()
            others = _count(facts.aligned.config, facts.aligned.name)[0]
            prints.append(facts.aligned.fingerprint)
            renamed = facts.renamed
    sizes = Sizes(total, layers * layer)
    return Base(base.config, base.tokenizer, prints, sizes, others, renamed)


def _take_loaded(
    recipe: AdaptRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Base:
    """Describe a loaded base.

    Raises:
        ConfigError: If its tokenizer is not given.
    """
    if tokenizer is None:
        raise ConfigError("the base is a loaded model; give its tokenizer too.")
    prints: list[str | None] = [fingerprint(model)]
    prints += [fingerprint(recipe.aligned)] if recipe.aligned else []
    total, layer = _count(model.config, recipe.base)
    sizes = Sizes(total, recipe.adapter_layers * layer)
    return Base(model.config, tokenizer, prints, sizes)


def _read_baking(recipe: BakeRecipe, lambda_range: tuple[float, float] | None) -> Base:
    """Read the base and the adapter of a `BakeRecipe`, without weights.

    Raises:
        LambdaError: If λ lies outside the range, by default the adapter's own.
        ConfigError: As in `_read_adaptation`.
    """
    with as_input_errors():
        base = _examine_base(recipe.base)
        settings = _adapter_settings(recipe.base, recipe.adapter, base)
        settings.bind(base.tokenizer)
        permitted = lambda_range or settings.lambda_range
        asked = [(f"λ={recipe.lam:g}", recipe.schedule)]
        require_range(permitted, asked, f"the adapter {recipe.adapter}")
        total, layer = _count(base.config, base.name)
        prints = [base.fingerprint, _fingerprint_adapter(recipe.adapter)]
    sizes, others = Sizes(total, total), settings.adapter_layers * layer
    return Base(base.config, base.tokenizer, prints, sizes, others)


def _read_rows(
    recipe: AdaptRecipe, tokenizer: Any, data: Dataset | None, *, skip_bad_rows: bool
) -> tuple[Dataset, Dataset]:
    """Return an adapter's training rows, and the same rows as prompts and completions.

    The latter are for measuring lengths: each preference is two rows in them.
    """
    if recipe.method == "dpo":
        pairs = data
        if pairs is None:
            pairs = load_preferences(
                recipe.data, skip_bad_rows=skip_bad_rows, columns=recipe.columns, places=True
            )
        pairs = recipe.prompting.apply(pairs)
        shared = [name for name in ("prompt", "tools", PLACE) if name in pairs.column_names]
        sides = [
            pairs.select_columns([*shared, side]).rename_column(side, "completion")
            for side in ("chosen", "rejected")
        ]
        return pairs, concatenate_datasets(sides)
    traces = read_traces(recipe, skip_bad_rows=skip_bad_rows) if data is None else data
    traces = recipe.prompting.apply(traces)
    if recipe.strip_thinking:
        traces = strip_thinking(traces, ThinkingTags.of(tokenizer))
    return traces, traces


def _examine_base(name: str) -> ModelFacts:
    facts = examine(name)
    if facts.kind == "adapter":
        raise UnsupportedModelError(
            f"the base {name} is a PEFT adapter, which would be in both streams; merge it into its "
            "base first (merge_and_unload) and give the merged model."
        )
    return facts


def _adapter_settings(name: str, adapter: str, base: ModelFacts) -> InRaConfig:
    """Read an adapter's settings; check that its files are complete and made for the base."""
    folder = resolve_adapter(adapter)
    settings = check_folder(folder)
    if base.kind != "gguf" and base.fingerprint is not None:
        require_base(settings, base.fingerprint, name, folder)
    return settings


def _count(config: Any, name: str) -> tuple[int, int]:
    """Count a model's parameters, and those of its first layer, without allocating them.

    Raises:
        UnsupportedModelError: If the model has no stack of decoder layers.
    """
    model = skeleton(config)
    layer = decoder_layers(model, name)[0]
    total, first = (sum(item.numel() for item in part.parameters()) for part in (model, layer))
    return total, first


def _fingerprint_adapter(adapter: str) -> str | None:
    folder = resolve_adapter(adapter)
    return fingerprint_file(folder / WEIGHTS_FILE) if fetch_weights(folder) else None


def _plan(run: TrainingRun, base: Base, rows: Dataset, lengths: Lengths) -> TrainingPlan:
    """Return the plan of a dry run: steps, memory and sample rows."""
    recipe: Recipe = run.recipe
    arguments = recipe.arguments
    steps, longest = plan_steps(arguments, lengths)

    facts = {
        **{key: value for key, value in recipe.to_tree().items() if key != "training"},
        "data": {"path": recipe.data, **lengths.to_json()},
        **steps,
        **plan_memory(
            arguments,
            base.config,
            base.sizes,
            tokens=longest,
            aligned_parameters=base.others,
            rows_each=2 if isinstance(arguments, DPOConfig) else 1,
        ),
        "output_state": run.state,
    }
    return TrainingPlan(facts, sample_rows(rows, run.tokenizer, arguments.max_length))


# The entry points.


class AdaptOptions(RunOptions, total=False):
    """The keyword options of `adapt`, which describes them."""

    tokenizer: PreTrainedTokenizerBase | None
    extrapolate: bool


@overload
def adapt(
    recipe: str | Path | Mapping[str, Any] | AdaptRecipe,
    data: Dataset | None = None,
    *,
    dry_run: Literal[True],
    **options: Unpack[AdaptOptions],
) -> TrainingPlan: ...


@overload
def adapt(
    recipe: str | Path | Mapping[str, Any] | AdaptRecipe | PreTrainedModel,
    data: Dataset | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> Outcome: ...


def adapt(
    recipe: str | Path | Mapping[str, Any] | AdaptRecipe | PreTrainedModel,
    data: Dataset | None = None,
    output: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dry_run: bool = False,
    extrapolate: bool = False,
    skip_bad_rows: bool = False,
    events: Events | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    command: str = "flexalign.adapt",
    **settings: Any,
) -> Outcome | TrainingPlan:
    """Train a layer adapter in front of a base, and save the adapter. The base does not change.

    A run that was stopped is resumed. A run that is finished is not run again. On Ctrl-C or SIGTERM
    the run writes a checkpoint and ends.

    Example::

        adapt("adapt.yaml")
        adapt({"base": "miniature", "data": "traces.jsonl", "output": "out/fast"})
        adapt("miniature", answers, "out/fast", strip_thinking=True, training={"max_steps": 200})
        model = InRaModel.from_pretrained("miniature", "out/fast")

    Args:
        recipe: A YAML file's path, a mapping with the keys of such a file, or an `AdaptRecipe`.
            If `output` is given: the base instead, as a known name, a folder, or a loaded model. A
            loaded model is restored after training.
        data: Rows in memory, instead of those that the recipe names: prompts with responses
            (`prompt` and `completion`), or with `chosen` and `rejected`.
        output: The adapter's folder. Only for calls without a recipe.
        tokenizer: The base's tokenizer. Required with a loaded model.
        dry_run: Load no weights and write nothing; return the plan of the run.
        extrapolate: Allow λ < 0.
        skip_bad_rows: Leave out rows that cannot be used.
        events: Receives progress and warnings.
        callbacks: As transformers' ``Trainer`` takes them.
        command: The command that the adapter's card shows.
        **settings: Without a recipe, its other keys by Python name: `method`, `training`, ….

    Returns:
        The outcome. For a dry run, the plan.

    Raises:
        ConfigError: If a setting is unknown or out of its range, or the output folder holds
            another run.
        LambdaError: If λ is not a finite number or a schedule, or is below 0 without `extrapolate`.
        DataError: If a row cannot be used, or no row is left after the thinking is stripped.
        UnsupportedModelError: If the base cannot have an adapter.
        Stopped: If a signal ended the run early.
    """
    loaded = recipe if isinstance(recipe, PreTrainedModel) else None
    if output is not None or loaded is not None:
        plan = _recipe_of(recipe, data, output, settings)
    elif settings:
        raise ConfigError(
            f"adapt takes a recipe, or a base with data and an output; {next(iter(settings))} "
            "belongs into the recipe."
        )
    else:
        plan = AdaptRecipe.of(recipe)
        if plan.schedule is not None and not extrapolate:
            require_forward([(f"λ = {plan.lam}", plan.schedule)], "allow it with --extrapolate")
    if plan.has_idle_gate:
        (events or Events()).note(IDLE_GATE)

    def prepare() -> tuple[Adaptation, Base, Dataset, Lengths]:
        base = _read_adaptation(plan) if loaded is None else _take_loaded(plan, loaded, tokenizer)
        asking = tokenizer or base.tokenizer
        settle_template(plan, asking)
        trained, rows = _read_rows(plan, asking, data, skip_bad_rows=skip_bad_rows)
        lengths = measure_lengths(rows, asking, plan.arguments.max_length)
        run = Adaptation(plan, trained, asking, models=base.prints, command=command, events=events)
        run.renamed = base.renamed
        run.base = loaded
        return run, base, rows, lengths

    if dry_run:
        with downloads_wait() as waiting:
            return _plan(*prepare()).with_downloads(waiting)
    run, base, _, _ = check_before_download(prepare)
    if base.renamed:
        (events or Events()).note(describe_renamed(base.renamed, "base"))
    return replace(run.run(callbacks), trained_parameters=base.sizes.trainable)


def _recipe_of(
    base: Any, data: Dataset | None, output: str | Path | None, settings: Mapping[str, Any]
) -> AdaptRecipe:
    """Make the recipe of a call that gives base, data and output instead of a recipe."""
    if data is None or output is None:
        raise ConfigError("adapt: with a base instead of a recipe, give data and output too.")
    name = base
    if isinstance(base, PreTrainedModel):
        name = base.config._name_or_path or type(base).__name__
    keys = {("lambda" if key == "lam" else key): value for key, value in settings.items()}
    return AdaptRecipe.parse(
        {"base": str(name), "data": "(given in memory)", "output": str(output), **keys}
    )


class BakeOptions(RunOptions, total=False):
    """The keyword options of `bake`, which describes them."""

    data: Dataset | None
    lambda_range: tuple[float, float] | None


@overload
def bake(
    recipe: str | Path | Mapping[str, Any] | BakeRecipe,
    *,
    dry_run: Literal[False] = False,
    **options: Unpack[BakeOptions],
) -> Outcome: ...


@overload
def bake(
    recipe: str | Path | Mapping[str, Any] | BakeRecipe,
    *,
    dry_run: Literal[True],
    **options: Unpack[BakeOptions],
) -> TrainingPlan: ...


@overload
def bake(
    recipe: str | Path | Mapping[str, Any] | BakeRecipe,
    *,
    dry_run: bool,
    **options: Unpack[BakeOptions],
) -> Outcome | TrainingPlan: ...


def bake(
    recipe: str | Path | Mapping[str, Any] | BakeRecipe,
    *,
    dry_run: bool = False,
    data: Dataset | None = None,
    lambda_range: tuple[float, float] | None = None,
    skip_bad_rows: bool = False,
    events: Events | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    command: str = "flexalign.bake",
) -> Outcome | TrainingPlan:
    """Make a plain model that behaves as base and adapter do at one λ.

    A LoRA dial is merged into its base, without training and data: its recipe has `base`,
    `adapter`, `lambda` and `output`. A layer adapter is trained into a model: the result runs in one stream, at the cost of the base. The student starts at the base and
    learns the fusion of the two streams (TrRa). Its divergence from that fusion is measured on
    held-out rows. Runs are resumed as those of `adapt` are.

    Example::

        outcome = bake({"base": "miniature", "adapter": "out/fast", "lambda": 0.5,
                        "data": "traces.jsonl", "output": "out/baked"})
        outcome.measures["held_out_divergence"]

    Args:
        recipe: A YAML file's path, a mapping with the keys of such a file, or a `BakeRecipe`.
        dry_run: Load no weights and write nothing; return the plan of the run.
        data: Rows in memory, instead of those that the recipe names.
        lambda_range: The least and the largest λ permitted; by default the adapter's range.
        skip_bad_rows: Leave out rows that cannot be used.
        events: Receives progress and warnings.
        callbacks: As transformers' ``Trainer`` takes them.
        command: The command that the model card shows.

    Returns:
        The outcome, of a layer adapter with the divergences in `measures`. For a dry run, the plan.

    Raises:
        ConfigError: If a setting is unknown or out of its range, there are fewer than two rows, or
            the output folder holds another run.
        LambdaError: If λ is not a finite number, or lies outside the range.
        DataError: If a row cannot be used.
        Stopped: If a signal ended the run early.
    """
    plan = BakeRecipe.of(recipe)
    if is_lora(plan.adapter):
        if data is not None:
            raise ConfigError(f"data: {plan.adapter} is a LoRA, which is merged; leave data out.")
        if dry_run:
            with downloads_wait() as waiting:
                return Merge.of(plan, lambda_range, command).plan().with_downloads(waiting)
        merge = check_before_download(partial(Merge.of, plan, lambda_range, command))
        return merge.run(events or Events())
    if not plan.data and data is None:
        raise ConfigError("data is missing; add a line `data: …`.")
    if plan.has_idle_gate:
        (events or Events()).note(IDLE_GATE)

    def prepare() -> tuple[Baking, Base, Dataset, Lengths]:
        base = _read_baking(plan, lambda_range)
        settle_template(plan, base.tokenizer)
        rows = read_traces(plan, skip_bad_rows=skip_bad_rows) if data is None else data
        rows = plan.prompting.apply(rows)
        if len(rows) < 2:
            raise ConfigError(f"{plan.data} has one row; held_out needs at least one more.")
        lengths = measure_lengths(rows, base.tokenizer, plan.arguments.max_length)
        run = Baking(plan, rows, base.tokenizer, models=base.prints, command=command, events=events)
        return run, base, rows, lengths

    if dry_run:
        with downloads_wait() as waiting:
            return _plan(*prepare()).with_downloads(waiting)
    return check_before_download(prepare)[0].run(callbacks)
