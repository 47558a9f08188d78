"""Training-time realignment: TRL's supervised fine-tuning with another loss.

Templates, completion masks, packing, accumulation, PEFT, reporters and resuming are TRL's. This
module adds the loss, equation 6: at every response token, the divergence between the student and
the fused teacher ``softmax(λ·aligned + (1−λ)·reference)``.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from flexalign._spelling import nearest
from flexalign.data.rendering import rendering_record
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, FlexAlignError
from flexalign.fusion import Lambda
from flexalign.lambdas import LambdaRange, TrainingLambda
from flexalign.lora_dial.configuration import LoRADialConfig, nearest_default
from flexalign.lora_dial.scaling import LoRAScale, require_linear
from flexalign.losses import Divergence, DivergenceMetrics
from flexalign.models.adapters import inner_model
from flexalign.models.loading import fingerprint
from flexalign.models.pair import ModelPair
from flexalign.models.prompted import PromptedModel
from flexalign.models.sources import resolve
from flexalign.models.weights import write_tensors
from flexalign.training.checkpoints import SealedCheckpoints, what_stands, writing
from flexalign.training.config import TrRaConfig
from flexalign.training.draws import LAMBDAS
from flexalign.training.hidden_cache import HiddenStateCache
from flexalign.training.hidden_cache.read import CachedCollator
from flexalign.training.models import (
    PLACES,
    Model,
    TrainingModels,
    assemble,
    choose_attention,
    have_equal_heads,
    is_adapter,
)
from flexalign.training.objective import CachedObjective, Objective
from flexalign.training.packing import require_packable
from flexalign.training.pair_rows import PairCollator, PairRows, split_sides
from flexalign.training.rollouts import Rollouts
from flexalign.training.rows import require_responses
from flexalign.training.student import assemble_student, require_fit, tokenizer_of

BATCH = "nan-batch.safetensors"
"""The file of a batch whose loss was NaN or infinite: its token ids, labels and masks."""


class TrRaTrainer(SealedCheckpoints, Rollouts):
    """Train a student towards the fusion of a reference and an aligned model.

    Example::

        trainer = TrRaTrainer(
            reference="models/base",
            aligned="models/concise",
            args=TrRaConfig(output_dir="out", lam=2.0, max_steps=200),
            train_dataset=traces,
        )
        trainer.train()

    Each of the three models is a path, a known name, or a module. The aligned model and the student
    may be PEFT adapters on the reference. If one of them is, or if `peft_config` is given, the
    base's parameters are in memory once: the reference is then the student with its adapters off.
    A module or pair whose base is shared in this way is changed in place, and must afterwards be
    used only through the trainer.

    The reference and the aligned model may have a prompt each (`PromptedModel`), and then be one model.
    The student is asked under the reference's prompt. The aligned teacher sees its own prompt followed
    by the same response tokens (`flexalign.training.pair_rows`). The tokenizer that is saved with the
    student has the reference's template arguments bound.

    With ``teacher="cached"`` no teacher is loaded. The hidden states are read from `args.cache_dir`
    (see `flexalign.training.hidden_cache`), and `reference` and `aligned` are only compared with
    the pair of the cache.

    With a range of λ (``lam={"low": 0, "high": 5}``) the student is a LoRA on the reference, and
    each row of a step draws its own λ (`flexalign.training.draws`): the teacher is equation 5 at
    that λ, and the student the reference with the LoRA's term times that λ. The log's `lambda` is
    then the mean over the response tokens, and `divergence_low`, `divergence_middle` and
    `divergence_high` are the divergence where λ is in the lower, middle and upper third of the
    range, measured in the logged steps. An evaluation measures every row in the middle of each
    third. Every folder that is saved is a LoRA dial: PEFT's files, and ``lora_dial.json`` with
    `dial`.

    Every log line has `divergence` (nats per response token, the mean of all steps since the last
    line), `lambda`, `kl_reference` and `kl_aligned` (KL of the student to either model, nats per
    token) and `tokens_seen` (input tokens without padding since step 0; it is kept in the trainer's
    state, so a resumed run continues the count). The two KL are measured only in the logged steps,
    because they need the logits of both models. Checkpoints are sealed by a manifest: see
    `flexalign.training.checkpoints`.

    Args:
        model: The student's start. None: the reference, as in the paper.
        reference: The model of λ=0, perhaps under a prompt. None: `model` as it is at the start.
        aligned: The model of λ=1, perhaps under a prompt.
        pair: Reference and aligned model, loaded and checked, instead of these two.
        parts: Student and teachers, already assembled, instead of these four.
        cache: The teachers' hidden states, already open, instead of `args.cache_dir`.
        pair_rows: Renders rows under two prompts, instead of the prompts of the two sides.
        args: The settings.
        train_dataset: As `SFTTrainer` takes it. Use `prompt` and `completion` (or `messages` with
            `assistant_only_loss`) so that only responses are trained on.
        eval_dataset: As `train_dataset`; its loss is the same divergence.
        processing_class: The tokenizer. None: the pair's.
        peft_config: Makes the student an adapter (LoRA) on its start.
        callbacks: As `Trainer` takes them.
        **options: `optimizers`, `data_collator`, … of `SFTTrainer`.

    Raises:
        ConfigError: If models are missing or contradict each other, or a setting does not apply to
            this loss.
        PairMismatchError: If the models do not fit together.
        UnsupportedModelError: If a model has no plain head, or packed documents see each other in
            it.
    """

    _tag_names = ["trl", "flexalign", "trra"]  # noqa: RUF012
    _name = "TrRa"
    _paper = {  # noqa: RUF012
        "title": "Flexible Realignment of Language Models",
        "id": "2506.12704",
    }
    loss_is_scaled_for_ga = True
    """Transformers' trainer then does not divide the loss by the number of accumulation steps. The
    denominator of this loss is already that of the whole step."""

    def __init__(
        self,
        model: str | nn.Module | None = None,
        reference: str | nn.Module | PromptedModel | None = None,
        aligned: str | nn.Module | PromptedModel | None = None,
        *,
        args: TrRaConfig,
        train_dataset: Dataset | IterableDataset,
        pair: ModelPair | None = None,
        parts: TrainingModels | None = None,
        cache: HiddenStateCache | None = None,
        pair_rows: PairRows | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if options.get(name) is not None:
                raise ConfigError(f"{name}: the loss builds no logits and is fixed; leave it out.")
        given = (model, reference, aligned, pair, peft_config)
        if parts is not None and any(one is not None for one in given):
            raise ConfigError(
                "parts are the student and its teachers, assembled; leave model, reference, aligned, "
                "pair and peft_config out."
            )
        if cache is not None and args.teacher != "cached":
            raise ConfigError(
                f"cache with teacher={args.teacher!r}: the teachers would run and be read from it; set "
                "teacher='cached', or leave cache out."
            )
        if args.rounds != 1:
            raise ConfigError(
                f"rounds={args.rounds}: a trainer runs one round; use flexalign.realign, or leave "
                "rounds out."
            )
        require_metric(args.metric_for_best_model, eval_dataset, args.schedule)

        one, other, prompts = split_sides(reference, aligned)
        if isinstance(args.schedule, LambdaRange):
            _require_lora(args.schedule, model, one, peft_config, parts)

        # Sides with prompts of their own: the rows are rendered under both.
        start = one if model is None else model
        if prompts is not None and pair_rows is None:
            tokenizer = processing_class or tokenizer_of(start, args)
            pair_rows = PairRows.of_run(tokenizer, prompts, args, start)
        if pair_rows is not None:
            require_responses(args)
            processing_class = pair_rows.tokenizer

        if args.teacher == "cached":
            if pair is not None or parts is not None:
                raise ConfigError("teacher='cached' takes no loaded teachers; leave pair out.")
            processing_class = processing_class or tokenizer_of(start, args)
            cache = cache or HiddenStateCache.open(args.cache_dir or "")
            require_fit(cache, (one, other), train_dataset, processing_class, args, pair_rows)
            parts = assemble_student(
                model, one, args, cache.vocab_size, peft_config, processing_class
            )
        elif parts is None:
            parts = assemble(
                model,
                one,
                other,
                pair,
                args,
                peft_config,
                processing_class,
                prompted=pair_rows is not None,
            )

        choose_attention(parts, args)
        if args.packing or args.padding_free:  # in both cases documents share a row
            require_packable(parts.models())

        # The trainer sets entries of the configuration that are not of the model (`use_cache`, the
        # special tokens); the student is saved with those that it had.
        self._config: Any = getattr(inner_model(parts.student), "config", None)
        self._own_config = copy.deepcopy(self._config)

        # TRL replaces the model's forward by one for its own loss. This loss needs the original.
        forward = inner_model(parts.student).__dict__.get("forward")
        super().__init__(
            model=parts.student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class or parts.tokenizer,
            callbacks=list(callbacks) if callbacks is not None else None,
            pair_rows=pair_rows,
            **options,
        )
        _restore_forward(inner_model(parts.student), forward)

        self._refuse_sequence_parallelism()
        self.objective = self._make_objective(parts, cache)
        # The trainer then counts the step's denominator over shifted labels, for every model.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

        self.dial: LoRADialConfig | None = None
        if self.lambda_range is not None:
            self.scale = _strength_of(parts, self.lambda_range)
            self.dial = _describe_dial(parts, model if one is None else one, args, pair_rows)
        self._last_lam = self.lam
        self._meters = {"train": Meter(self.lambda_range), "eval": Meter(self.lambda_range)}

    def _make_objective(
        self, parts: TrainingModels, cache: HiddenStateCache | None
    ) -> Objective | CachedObjective:
        """Return the loss of the student, with loaded teachers or with those of the cache.

        Loaded teachers are placed, or sharded, as the student is.
        """
        args = self.args
        equation = {
            "divergence": cast(Divergence, args.divergence),
            "beta": args.beta,
            "gate": args.gate,
            "chunk_size": args.chunk_size,
            "sampled_objective": ("sampled" if args.rollout_objective == "sampled" else "sequence"),
        }

        if cache is not None:
            for what in ("train_dataset", "eval_dataset"):
                cache.require_all(getattr(self, what), what)
            self.data_collator: Any = CachedCollator(self.data_collator, cache)
            heads = cache.heads(self.accelerator.device)
            return CachedObjective(parts.student, parts.form, heads, **equation)

        if self._pair_rows is not None:
            self.data_collator = PairCollator(self.data_collator)
        if parts.reference is None or parts.aligned is None:
            raise ConfigError(
                "parts hold no teachers, and teacher='online' needs both; give them, or a cache and "
                "teacher='cached'."
            )
        one, other = parts.reference, parts.aligned
        for teacher in (one,) if one is other else (one, other):
            teacher.prepare(
                self.accelerator, deepspeed=self.is_deepspeed_enabled, fsdp=self.is_fsdp_enabled
            )
        teachers = (parts.reference, parts.aligned)
        shares_head = have_equal_heads(*teachers)
        return Objective(parts.student, parts.form, *teachers, shares_head, **equation)

    @property
    def lam(self) -> float:
        """λ at the current step; with a range its middle, which is the mean of the rows' λ."""
        schedule: TrainingLambda = self.args.schedule
        return schedule.at(0.5 if isinstance(schedule, LambdaRange) else self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return equation 6 on one batch, as its share of the mean over the whole step.

        A loss that is NaN or infinite stops the run before a weight is changed.

        Args:
            model: The student as the trainer wrapped it.
            inputs: A batch of the collator, including `labels`.
            return_outputs: Must be False: no logits are built.
            num_items_in_batch: Response tokens of the step, over all batches and processes. None
                (in an evaluation): those of this batch.

        Raises:
            ConfigError: If outputs are requested.
            FlexAlignError: If the loss is NaN or infinite.
        """
        if return_outputs:
            raise ConfigError("the loss builds no logits; evaluate with prediction_loss_only=True.")

        given = {key: value for key, value in inputs.items() if key != "labels"}
        sampled = self.take_sampled(given)
        mask = inputs["labels"][:, 1:] != -100
        response_tokens = mask.sum()
        num_items = response_tokens if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(num_items, device=mask.device).clamp(min=1)

        # A batch of an evaluation has no λ of its own: it is measured at several of a range.
        drawn = given.pop(LAMBDAS, None)
        self._last_lam = self.lam
        lams = [self.lam] if drawn is None else [drawn]
        if self.lambda_range is not None and drawn is None:
            lams = [self.lambda_range.at((third + 0.5) / 3) for third in range(3)]

        losses = []
        for lam in lams:
            if self.scale is not None:
                self.scale.set(lam)  # until the backward is done
            by_token = _by_prediction(lam)
            with self.accelerator.autocast():
                loss, metrics = self.objective(
                    model, given, mask, by_token, num_items, self._measures, **sampled
                )
            require_finite_loss(
                loss, inputs, self.lam, self.state.global_step, Path(self.args.output_dir)
            )
            self._meters[self._mode].add(
                loss, metrics, num_items, response_tokens, _count_tokens(given), by_token, mask
            )
            losses.append(loss)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        if drawn is None and self.scale is not None:
            self.scale.set(None)  # nothing runs backward through an evaluation

        if num_items_in_batch is None:
            return loss
        # DDP and FSDP average gradients over processes, but the denominator is of all processes.
        replicas: int = self.accelerator.num_processes // self.get_tp_size()
        return loss * replicas

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the divergence, λ, both KL and the tokens seen so far."""
        means = self._meters[self._mode].take_means(self.accelerator)
        if means:
            # Each of several evaluation data sets has its own prefix, as its loss has.
            losses = [key for key in logs if key.endswith("_loss")]
            prefix = "" if self._mode == "train" else [*losses, "eval_loss"][0][: -len("loss")]
            values = {"lambda": self._last_lam, **means}
            logs.update({prefix + name: value for name, value in values.items()})
            if self._mode == "train":
                logs["tokens_seen"] = self._update_tokens_seen()
        super().log(logs, start_time)

    @property
    def _measures(self) -> bool:
        """Whether the two KL are measured: in evaluations, and in steps that are logged.

        Steps are logged as transformers' `DefaultFlowCallback` does. The last step of the run is
        measured too, because the closing line may need its figures. If logging is per epoch, the
        last step of an epoch is not known in advance, so every step is measured.
        """
        if self._mode == "eval" or self.args.logging_strategy == IntervalStrategy.EPOCH:
            return True
        step: int = self.state.global_step + 1
        if step == self.state.max_steps or (step == 1 and self.args.logging_first_step):
            return True
        by_steps: bool = self.args.logging_strategy == IntervalStrategy.STEPS
        return by_steps and step % self.state.logging_steps == 0

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _update_tokens_seen(self) -> int:
        self.state.num_input_tokens_seen += self._meters["train"].take_input_tokens(
            self.accelerator
        )
        return int(self.state.num_input_tokens_seen)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Do nothing: :meth:`_update_tokens_seen` counts, also in packed rows."""

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with self._with_own_config():
            super()._save(output_dir, state_dict)
        # With FSDP all processes come here.
        if self.dial is not None and self.args.should_save:
            self.dial.save(Path(output_dir or self.args.output_dir))

    @contextmanager
    def _with_own_config(self) -> Iterator[None]:
        """Give the student the configuration that it had before training, inside the block."""
        if self._config is None:
            yield
            return
        own: Any = copy.deepcopy(self._own_config)
        if self.args.eos_token is not None:  # this one is a setting of the run
            token = self._config.get_text_config().eos_token_id
            own.get_text_config().eos_token_id = token

        # The object stays: wrappers and layers of the model refer to it.
        trained = self._config.__dict__
        self._config.__dict__ = own.__dict__
        try:
            yield
        finally:
            self._config.__dict__ = trained

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._update_tokens_seen()
        require_finite_weights(self.model, self.state.global_step, Path(self.args.output_dir))
        super()._save_checkpoint(model, trial)

    def _refuse_sequence_parallelism(self) -> None:
        config = self.accelerator.parallelism_config
        if config is not None and (config.cp_enabled or config.sp_enabled):
            raise ConfigError(
                "context and sequence parallelism split a sequence over devices, which the loss "
                "does not follow; use data parallelism (DDP, FSDP2, ZeRO-3)."
            )


_METRICS = ("loss", "divergence", "lambda", "kl_reference", "kl_aligned")
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
"""What an evaluation measures, and how fast it was."""


def require_metric(name: str | None, eval_dataset: Any, lam: TrainingLambda) -> None:
    """Refuse a `metric_for_best_model` that no evaluation measures, before the first step.

    Args:
        name: The metric, with or without ``eval_``; None if none is asked for.
        eval_dataset: The data set, or a mapping of several.
        lam: λ of the run. An evaluation over a range measures the divergence in its thirds too.

    Raises:
        ConfigError: If the metric will not be there.
    """
    if name is None or eval_dataset is None:
        return
    sets = [f"{key}_" for key in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    thirds = [f"divergence_{third}" for third in THIRDS if isinstance(lam, LambdaRange)]
    known = [prefix + metric for prefix in sets for metric in (*_METRICS, *thirds, *_SPEEDS)]
    if name.removeprefix("eval_") not in known:
        raise ConfigError(
            f"metric_for_best_model={name!r} is not measured by this trainer, which builds no "
            f"logits{nearest(name.removeprefix('eval_'), known, prefix='eval_')}"
        )


def _require_lora(
    within: LambdaRange,
    model: Model | None,
    reference: Model | None,
    peft_config: PeftConfig | None,
    parts: TrainingModels | None,
) -> None:
    """Refuse, before anything is loaded, a student that cannot have λ as its strength.

    Raises:
        ConfigError: If the student is no LoRA.
        UnsupportedModelError: If the LoRA is not linear in its strength.
    """
    if peft_config is not None:
        require_linear(peft_config, "peft_config")
    elif parts is None and not is_adapter(model):
        raise ConfigError(
            f"lam: a range ({within}) trains one LoRA whose strength is λ; give peft_config, or "
            "one λ."
        )
    # λ = 0 is the student without its LoRA, so that has to be the reference.
    named = isinstance(model, PLACES) and isinstance(reference, PLACES)
    if peft_config is not None and named and str(model) != str(reference):
        raise ConfigError(
            f"lam: with a range ({within}) the student starts at the reference, which it is at "
            "λ = 0; leave model out."
        )


def _strength_of(parts: TrainingModels, within: LambdaRange) -> LoRAScale:
    """Return the strength of a student's LoRA.

    Raises:
        ConfigError: If the student is no LoRA on the reference.
        UnsupportedModelError: If the LoRA is not linear in its strength.
    """
    student = parts.student
    on_reference = parts.reference is None or parts.reference.shares_student
    if not isinstance(student, PeftModel) or not on_reference:
        raise ConfigError(
            f"lam: a range ({within}) trains one LoRA on the reference; give peft_config, and "
            "leave model out or give an adapter on the reference."
        )
    return LoRAScale(student, student.active_adapters[0])


def _describe_dial(
    parts: TrainingModels,
    reference: Model | None,
    args: TrRaConfig,
    pair_rows: PairRows | None,
) -> LoRADialConfig:
    """Return the settings of the dial that a student becomes, as far as the trainer knows them."""
    source = resolve(reference) if isinstance(reference, PLACES) else None
    named = getattr(inner_model(parts.student), "name_or_path", "") if source is None else reference
    # A GGUF file's fingerprint is of its bytes; that of a dial's base is of its weights.
    from_file = source is not None and source.gguf_file is None and not source.is_adapter
    tokenizer = parts.tokenizer if pair_rows is None else pair_rows.tokenizer
    system = None if pair_rows is None else pair_rows.system
    tags = ThinkingTags.of(tokenizer)
    within = cast(LambdaRange, args.schedule)
    return LoRADialConfig(
        base=str(named),
        base_fingerprint=fingerprint(cast(Model, reference) if from_file else parts.student),
        default_lambda=nearest_default(within.low, within.high),
        lambda_range=within.values,
        gate=args.gate,
        thinking_tags=(tags.open, tags.close),
        rendering=rendering_record(tokenizer) | ({} if system is None else {"system": system}),
    )


def _by_prediction(lam: Lambda) -> Lambda:
    """Return λ at the positions whose prediction counts: all tokens of a row but the last."""
    return lam[:, :-1] if isinstance(lam, Tensor) and lam.ndim == 2 else lam


def _count_tokens(inputs: dict[str, Any]) -> Tensor:
    attention_mask: Tensor | None = inputs.get("attention_mask")
    if attention_mask is not None:
        return attention_mask.sum()
    ids: Tensor = inputs["input_ids"]
    return torch.tensor(ids.numel(), device=ids.device)


def _restore_forward(model: nn.Module, forward: Any) -> None:
    """Undo TRL's replacement of the model's forward.

    A copy of a model with TRL's forward would run with the weights of the original.

    Args:
        model: The transformers model.
        forward: The instance's own forward before the replacement; None: it had none.
    """
    if forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.forward = forward


THIRDS = ("low", "middle", "high")
"""The thirds of a range of λ, as the log names them."""


class Meter:
    """Sums over batches and processes, for the log and for the count of tokens.

    Adding does not synchronise with the device. Reading is a collective operation: all processes
    must read at the same time, add the same number of batches in between, and measure the same
    ones.
    """

    def __init__(self, within: LambdaRange | None = None) -> None:
        """Create the meter.

        Args:
            within: The range from which rows draw their λ; None if all have the step's λ.
        """
        self._within = within
        # (5,): nats of the loss, its response tokens; nats of the two KL, their response tokens.
        # With a range (12,): then the sum of λ over response tokens, and for each third of the
        # range the nats of the loss and the response tokens, of the measured batches.
        self._window: Tensor | None = None
        self._input_tokens: Tensor | None = None

    def add(
        self,
        loss: Tensor,
        metrics: DivergenceMetrics | None,
        num_items: Tensor,
        response_tokens: Tensor,
        input_tokens: Tensor,
        lam: Lambda,
        mask: Tensor,
    ) -> None:
        """Count one batch.

        Args:
            loss: The batch's sum divided by `num_items`.
            metrics: The two KL of the batch, divided likewise; None if they were not measured.
            num_items: The denominator of both.
            response_tokens: Tokens of this batch that the loss counts.
            input_tokens: Tokens of this batch, without padding.
            lam: λ of this batch: a number, or one per row or position.
            mask: The positions that the loss counts, shape (B, T − 1).
        """
        tokens = response_tokens.double()
        row = torch.stack([loss.detach().double() * num_items, tokens, *3 * [tokens.new_zeros(())]])
        if metrics is not None:
            row[2] = metrics.kl_reference.double() * num_items
            row[3] = metrics.kl_aligned.double() * num_items
            row[4] = tokens
        if self._within is not None:
            row = torch.cat([row, self._by_thirds(self._within, lam, mask, metrics)])

        self._window = row if self._window is None else self._window + row
        self._input_tokens = (
            input_tokens if self._input_tokens is None else self._input_tokens + input_tokens
        )

    def take_means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means since the last call, in nats per response token, and reset the sums.

        Returns:
            `divergence`, over all batches, and `kl_reference` and `kl_aligned`, over the measured
            ones. With a range of λ also `lambda`, over all batches, and `divergence_low`,
            `divergence_middle` and `divergence_high`, over the measured ones. A mean over no
            response token is left out.
        """
        if self._window is None:
            return {}
        window = accelerator.reduce(self._window, "sum").tolist()
        nats, tokens, to_reference, to_aligned, measured, *by_lambda = window
        self._window = None

        means = {"divergence": nats / tokens} if tokens else {}
        if measured:
            means |= {"kl_reference": to_reference / measured, "kl_aligned": to_aligned / measured}
        if by_lambda and tokens:
            means["lambda"] = by_lambda[0] / tokens
            sums = zip(THIRDS, by_lambda[1:4], by_lambda[4:7], strict=True)
            means |= {f"divergence_{third}": part / of for third, part, of in sums if of}
        return means

    def take_input_tokens(self, accelerator: Accelerator) -> int:
        """Return the tokens since the last call, without padding, and reset the count."""
        if self._input_tokens is None:
            return 0
        tokens = int(accelerator.reduce(self._input_tokens, "sum"))
        self._input_tokens = None
        return tokens

    @staticmethod
    def _by_thirds(
        within: LambdaRange, lam: Lambda, mask: Tensor, metrics: DivergenceMetrics | None
    ) -> Tensor:
        """Return the sum of λ, and the nats and tokens of each third of the range, shape (7,)."""
        rows = (
            lam if isinstance(lam, Tensor) else torch.full_like(mask[:, 0], lam, dtype=torch.float)
        )
        rows = rows[:, None] if rows.ndim == 1 else rows
        lams = rows.expand(mask.shape)[mask].double()
        nats, tokens = lams.new_zeros(2, 3).unbind()
        if metrics is not None:
            shares = (lams - within.low) / (within.high - within.low)
            thirds = (3 * shares).long().clamp(0, 2)
            nats = nats.index_add(0, thirds, metrics.per_token.double())
            tokens = tokens.index_add(0, thirds, torch.ones_like(lams))
        return torch.cat([lams.sum()[None], nats, tokens])


# A loss or a weight that is NaN or infinite ends the run at once. What is needed to find the cause
# is saved.


def require_finite_loss(
    loss: Tensor, inputs: Mapping[str, Any], lam: float, step: int, output: Path
) -> None:
    """Check a loss. If it is NaN or infinite, save its batch in the run's folder and raise.

    Args:
        loss: The loss of one batch.
        inputs: That batch.
        lam: λ of the step.
        step: Number of finished optimizer steps.
        output: The run's folder.

    Raises:
        FlexAlignError: If the loss is NaN or infinite; names the batch's file and the newest
            complete checkpoint.
    """
    if torch.isfinite(loss):
        return
    batch = {
        name: value.detach().cpu().contiguous()
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    with writing("the batch", output):
        output.mkdir(parents=True, exist_ok=True)
        write_tensors(output / BATCH, batch, {"step": str(step), "lambda": str(lam)})
    _stop(
        f"the loss is {float(loss.detach())} in step {step + 1} (λ={lam:g}); its batch is saved in "
        f"{output / BATCH}",
        output,
    )


def require_finite_weights(model: nn.Module, step: int, output: Path) -> None:
    """Check the trained weights before a checkpoint. Each process checks those that it holds.

    Args:
        model: The student; frozen weights are not checked.
        step: Number of finished optimizer steps.
        output: The run's folder.

    Raises:
        FlexAlignError: If a trained weight is NaN or infinite; names it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not torch.isfinite(weight.detach().sum()):
            _stop(f"after step {step} the weight {name} is no number any more", output)


def _stop(problem: str, output: Path) -> NoReturn:
    raise FlexAlignError(
        f"{problem}; {what_stands(output)}. Lower the learning rate or λ, or set max_grad_norm, and look at the "
        "data; another setting is another run, so name another output."
    )
