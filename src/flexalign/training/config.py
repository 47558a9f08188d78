"""The settings of a TrRa run: those of TRL's supervised fine-tuning, and those of realignment."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from flexalign._packages import require_packages
from flexalign.errors import ConfigError
from flexalign.lambdas import LambdaRange, Schedule, TrainingLambda, parse_training_lambda
from flexalign.losses import DIVERGENCES

_TEACHERS = ("online", "cached")
_OBJECTIVES = ("token", "sequence", "sampled")

_MODEL_OPTIONS = ("attn_implementation", "dtype")
"""The permitted keys of TRL's ``model_init_kwargs``; flexalign loads the models itself."""

_WITHOUT_EFFECT = {
    "loss_type": "nll",
    "label_smoothing_factor": 0.0,
    "router_aux_loss_coef": 0.0,
}
"""TRL's settings of losses that TrRa does not have, each with the only permitted value."""


@dataclass
class TrRaConfig(SFTConfig):  # type: ignore[misc]
    """Settings of a TrRa run.

    All fields of `trl.SFTConfig` are available. Two defaults differ from TRL's: `bf16` is on only
    if an accelerator is used, and `router_aux_loss_coef` is 0. The metadata of each field below has
    its description.

    Raises:
        ConfigError: If a value is out of its range, or is not supported.
        LambdaError: If a λ is not a finite number.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "lam"]  # noqa: RUF012

    # This type makes transformers' argument parser pass a JSON text unchanged.
    lam: dict[str, Any] | str | float | None = field(
        default=1.0,
        metadata={
            "help": "λ of the fused teacher, equation 5: 0 the reference, 1 the aligned model, "
            "above 1 beyond it. A number, a schedule over the training step such as "
            '{"kind": "linear", "start": 0, "end": 2, "steps": 200}, or, for a LoRA student, a '
            'range, {"low": 0, "high": 5} or "0:5": each row draws its own λ, which is the '
            "strength of its LoRA."
        },
    )
    divergence: str = field(
        default="reverse",
        metadata={
            "help": "What is minimised: 'reverse' is KL(student‖teacher), the paper's equation 6; "
            "'forward' is KL(teacher‖student), the released code's; 'jsd' lies between them.",
            "choices": list(DIVERGENCES),
        },
    )
    beta: float = field(
        default=0.5,
        metadata={"help": "Where 'jsd' lies: 0 is forward, 1 is reverse. From 0 to 1."},
    )
    gate: float | None = field(
        default=None,
        metadata={
            "help": "τ, a total variation from 0 to 1: λ outside [0, 1] is used only at tokens "
            "where reference and aligned differ by more. Off by default."
        },
    )
    chunk_size: int = field(
        default=256,
        metadata={"help": "Tokens whose logits exist at one time, in each of the three models."},
    )
    teacher: str = field(
        default="online",
        metadata={
            "help": "'online' runs both teachers in every step; 'cached' reads their hidden "
            "states from cache_dir.",
            "choices": list(_TEACHERS),
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the hidden states, for teacher='cached'."}
    )
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "Permit pickled weights, whose loading can run code."},
    )
    by_id: bool = field(
        default=False,
        metadata={
            "help": "Take special tokens of reference, aligned model and student that differ in "
            "name alone, at equal ids, for the same; the reference's names are used."
        },
    )
    rounds: int = field(
        default=1,
        metadata={
            "help": "1 is TrRa; k is TrRa-iter: round i realigns the reference with what round "
            "i−1 made as the aligned model. One trainer runs one round."
        },
    )
    rollouts: float = field(
        default=0.0,
        metadata={
            "help": "Share of the batches, from 0 to 1, whose responses the student samples."
        },
    )
    rollout_objective: str = field(
        default="token",
        metadata={
            "help": "What sampled batches minimise: 'token' is the divergence to equation 5 at "
            "every token; 'sequence' is the reverse KL of whole responses, whose optimum is that "
            "of the alignment's objective at another KL weight, which equation 5 approximates; "
            "'sampled' is the aim of 'token' by a policy gradient, in which each sampled token's "
            "reward is log p_teacher - log p_student (arXiv 2602.12125).",
            "choices": list(_OBJECTIVES),
        },
    )
    rollout_max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens after which a sampled response is cut off; by default what the prompt "
            "leaves of max_length."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={"help": "The load-balancing loss of experts. TrRa has none: 0."},
    )

    def __post_init__(self) -> None:
        self._check_realignment()
        _settle_defaults(self)
        require_deepspeed(self.deepspeed)
        super().__post_init__()
        self._check_training()
        require_settings_packages(self)

    @property
    def schedule(self) -> TrainingLambda:
        """λ as a function of the training step, or the range from which each row draws its own."""
        kept: TrainingLambda = self.__dict__["_schedule"]
        if kept.to_json() != self.lam:  # the field was assigned after the check
            kept = self.__dict__["_schedule"] = parse_training_lambda(self.lam)
        return kept

    def _check_realignment(self) -> None:
        if isinstance(self.lam, list | tuple):
            raise ConfigError(
                f"lam: a trainer trains one λ, got {len(self.lam)}; make one for each (flexalign "
                "realign --lambda 0.5,1 does, and from one cache if teacher='cached')."
            )
        schedule = parse_training_lambda(self.lam)
        if isinstance(schedule, Schedule) and schedule.follows_thinking:
            raise ConfigError(
                "lam: a thinking schedule goes by generated tokens; in training λ is a number or "
                "a schedule over the step (linear, cosine, piecewise)."
            )
        # The field holds JSON, which is saved with a run. The parsed schedule is kept beside it.
        self.__dict__["_schedule"] = schedule
        self.lam = schedule.to_json()

        _require_choice("divergence", self.divergence, DIVERGENCES)
        _require_choice("teacher", self.teacher, _TEACHERS)
        _require_share("beta", self.beta)
        if self.divergence != "jsd" and self.beta != type(self).beta:
            raise ConfigError(
                f"beta={self.beta} with divergence={self.divergence!r}: it says where 'jsd' lies; set "
                "divergence='jsd', or leave beta out."
            )
        _require_share("rollouts", self.rollouts)
        if self.gate is not None:
            _require_share("gate", self.gate)
        _require_count("chunk_size", self.chunk_size)
        _require_count("rounds", self.rounds)
        if isinstance(schedule, LambdaRange) and self.rounds != 1:
            raise ConfigError(
                f"rounds with a range of λ ({schedule}): the LoRA's strength reaches every λ of it "
                "in one round; leave rounds out."
            )

        if self.teacher == "cached":
            self._check_cached()
        elif self.cache_dir is not None:
            raise ConfigError(
                f"cache_dir={self.cache_dir!r} with teacher={self.teacher!r}: both teachers run, and "
                "no cache is read; set teacher='cached', or leave cache_dir out."
            )
        _require_choice("rollout_objective", self.rollout_objective, _OBJECTIVES)
        if self.rollout_max_new_tokens is not None:
            _require_count("rollout_max_new_tokens", self.rollout_max_new_tokens)
        if self.rollouts > 0:
            self._check_rollouts()
        elif self.rollout_objective != "token":
            raise ConfigError(
                f"rollout_objective={self.rollout_objective!r} without rollouts: it is what sampled "
                "batches minimise, and rollouts=0 samples none; set rollouts (such as 0.5), or leave "
                "rollout_objective out."
            )
        elif self.rollout_max_new_tokens is not None:
            raise ConfigError(
                f"rollout_max_new_tokens={self.rollout_max_new_tokens} without rollouts: it cuts "
                "sampled responses off, and rollouts=0 samples none; set rollouts (such as 0.5), or "
                "leave rollout_max_new_tokens out."
            )

    def _check_cached(self) -> None:
        if self.cache_dir is None:
            raise ConfigError(
                "teacher='cached' needs cache_dir, the folder that flexalign cache filled."
            )
        for name, neutral, reason in (
            ("rounds", 1, "every round has another aligned model, which a cache would serve once"),
            ("rollouts", 0, "the cache has no responses of the student"),
        ):
            if getattr(self, name) != neutral:
                raise ConfigError(f"{name} with teacher='cached': {reason}; use teacher='online'.")
        if self.packing and self.packing_strategy == "bfd_split":
            raise ConfigError(
                "packing_strategy='bfd_split' with teacher='cached': it cuts documents, and the "
                "cache holds whole ones; use 'bfd'."
            )

    def _check_rollouts(self) -> None:
        if self.packing or self.padding_free:
            raise ConfigError(
                "rollouts with packing or padding_free: samples have lengths of their own, and a "
                "row holds one; leave packing and padding_free out."
            )
        if self.max_length is None and self.rollout_max_new_tokens is None:
            raise ConfigError("rollouts without an end: set max_length or rollout_max_new_tokens.")
        if self.rollout_objective == "token":
            return
        if self.divergence != "reverse":
            raise ConfigError(
                f"rollout_objective={self.rollout_objective!r} with "
                f"divergence={self.divergence!r}: it is a "
                "reverse KL; use divergence='reverse'."
            )
        if self.rollout_objective == "sequence" and self.per_device_train_batch_size < 2:
            raise ConfigError(
                "rollout_objective='sequence' compares a response with the others of its batch; "
                "set per_device_train_batch_size to 2 or more (8 or more is better)."
            )

    def _check_training(self) -> None:
        for name, neutral in _WITHOUT_EFFECT.items():
            value = getattr(self, name)
            if value != neutral:
                raise ConfigError(
                    f"{name}={value!r} is of another loss; the divergence to the fused teacher "
                    "has no such part, so leave it out."
                )

        unknown = sorted(set(self.model_init_kwargs or {}) - set(_MODEL_OPTIONS))
        if unknown:
            raise ConfigError(
                f"model_init_kwargs.{unknown[0]} is not heeded; of these, "
                f"{' and '.join(_MODEL_OPTIONS)} are."
            )

        if self.packing_strategy != "bfd" and not (self.packing or self.eval_packing):
            raise ConfigError(
                f"packing_strategy={self.packing_strategy!r} without packing: it says how rows are "
                "packed; set packing=True, or leave packing_strategy out."
            )
        if self.packing and self.packing_strategy == "wrapped":
            raise ConfigError(
                "packing_strategy='wrapped' cuts documents and lets the pieces see each other; "
                "use 'bfd' or 'bfd_split'."
            )
        if self.eval_packing and not (self.packing or self.padding_free):
            raise ConfigError(
                "eval_packing=True without packing hides where a document begins; leave it out."
            )

        if not self.average_tokens_across_devices:
            raise ConfigError(
                "average_tokens_across_devices=False weighs tokens by the process they are on; "
                "the loss has one denominator, the response tokens of the whole step, so leave "
                "it out."
            )


def _settle_defaults(config: Any) -> None:
    """Set defaults, in place, that TRL leaves open or sets for a GPU."""
    if config.bf16 is None:
        config.bf16 = not config.fp16 and not config.use_cpu and torch.accelerator.is_available()
    # TRL's default goes by the old name of this field, which transformers warns about.
    if config.activation_checkpointing is None:
        config.activation_checkpointing = bool(config.gradient_checkpointing)
    if config.activation_checkpointing_kwargs is None:
        config.activation_checkpointing_kwargs = config.gradient_checkpointing_kwargs


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _require_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a number from 0 to 1, got {value!r}.")


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")


# Settings that need a package which flexalign does not install are checked before training.

_REPORTERS = {
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""Reporters of transformers, each with its module and the name of its package."""


def require_deepspeed(settings: object) -> None:
    """Check that DeepSpeed is installed if the settings or the launcher select it.

    Call it before the trainer's settings are created, which fails without a helpful message.

    Args:
        settings: The value of the setting ``deepspeed``, or None.

    Raises:
        ConfigError: If DeepSpeed is not installed.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes")
    if settings or launched:
        require_packages("DeepSpeed's ZeRO", "deepspeed", install="'flexalign[deepspeed]'")


def require_settings_packages(args: TrainingArguments) -> None:
    """Check that the packages of a trainer's settings are installed: kernels, reporters, optimizer.

    The trainer itself would only fail after the models are loaded, or in the first step.

    Args:
        args: The settings of any of TRL's trainers.

    Raises:
        ConfigError: If a package is missing, or a reporter is unknown.
    """
    if args.use_liger_kernel:
        require_packages("use_liger_kernel", "liger_kernel", install="liger-kernel (and a GPU)")
    reporters = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    _require_reporters([name for name in reporters if name and name != "none"])
    _require_optimizer(args)


def _require_reporters(names: list[str]) -> None:
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"report_to: {error}") from None
    for name in names:
        if name in _REPORTERS:
            module, package = _REPORTERS[name]
            require_packages(f"report_to {name}", module, install=package)
        elif name == "tensorboard" and find_spec("tensorboardX") is None:
            require_packages("report_to tensorboard", "tensorboard", install="tensorboard")


def _require_optimizer(args: Any) -> None:
    """Check that transformers can import the optimizer.

    Raises:
        ConfigError: If the optimizer needs a package that is not installed.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        name = getattr(args.optim, "value", args.optim)
        reason = " ".join(str(error).split())
        raise ConfigError(f"optim {name} needs a package more: {reason}") from None
    except (ValueError, TypeError, AttributeError):
        # Some optimizers need the model, which is not loaded yet. The trainer checks them later.
        return
