"""What an adapter's training, and a baking, is told: typed, with defaults, from YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

import yaml

from flexalign.errors import ConfigError, FlexAlignError
from flexalign.lambdas import Schedule, finite_lambda
from flexalign.training.recipes import (
    DEFAULT_TRAINING,
    check_settings,
    decisive,
    parse_training,
    read_tree,
)

DEFAULT_ADAPT_TRAINING: dict[str, Any] = {
    **{name: value for name, value in DEFAULT_TRAINING.items() if name != "max_steps"},
    "num_train_epochs": 3,
    "max_length": 4096,
}
"""Where ``training`` differs from TRL's defaults in ``adapt``: the paper's three epochs at a
learning rate of 2e-5 and a cut-off of 4096 tokens, the rest as in ``realign``."""

_YAML_NAMES = {"lam": "lambda"}
_REALIGNMENT = ("lam", "divergence", "beta", "gate", "chunk_size")

R = TypeVar("R", bound="_Recipe")


@dataclass(frozen=True)
class _Recipe:
    """What both have in common: how they are read, and what becomes of ``training``."""

    default_training: ClassVar[dict[str, Any]] = {}

    @classmethod
    def load(cls: type[R], path: str | Path, *, overrides: Sequence[str] = (), **given: Any) -> R:
        """Read a recipe.

        Args:
            path: The YAML file.
            overrides: ``key=value`` texts with dotted keys, the value as YAML.
            **given: Top-level values that win over both, by Python name; None is ignored.

        Raises:
            ConfigError: If the file cannot be read, a key is unknown or missing, or a value is of
                another type or out of its range.
            LambdaError: If λ is not a finite number or a schedule.
        """
        by_yaml_name = {_YAML_NAMES.get(name, name): value for name, value in given.items()}
        return cls.parse(read_tree(path, overrides, by_yaml_name))

    @classmethod
    def parse(cls: type[R], tree: Mapping[str, Any]) -> R:
        """Check a mapping in the form of the YAML file; raises as `load` does."""
        hints = {name: hint for name, hint in get_type_hints(cls).items() if name in _names(cls)}
        hints["training"] = dict[str, Any] | None
        wanted = {_YAML_NAMES.get(name, name): hint for name, hint in hints.items()}
        required = [
            _YAML_NAMES.get(item.name, item.name)
            for item in fields(cls)
            if item.default is MISSING and item.default_factory is MISSING
        ]
        values = check_settings(tree, wanted, "", required)
        values = {("lam" if key == "lambda" else key): value for key, value in values.items()}
        recipe = cls(**values | {"training": values.get("training") or {}})
        recipe._check()
        training = parse_training(values.get("training"), recipe._settings_class())
        recipe = replace(recipe, training=training)  # type: ignore[call-arg]
        recipe.training_arguments()
        return recipe

    def training_arguments(self) -> Any:
        """Build the trainer's settings.

        Raises:
            ConfigError: If a value is out of its range.
        """
        import torch

        from flexalign.training.config import require_deepspeed, require_settings_packages

        training = self._full_training()
        accelerated = torch.accelerator.is_available() and not training.get("use_cpu")
        training.setdefault("dataloader_pin_memory", accelerated)
        # Otherwise several processes without an accelerator would each train alone.
        training.setdefault("use_cpu", not accelerated)
        training.setdefault("bf16", accelerated and not training.get("fp16"))
        # TRL's default goes by the old name of this field, which transformers warns about.
        checkpointing = training.pop("gradient_checkpointing", True)
        training.setdefault("activation_checkpointing", checkpointing)
        kwargs = training.pop("gradient_checkpointing_kwargs", None)
        training.setdefault("activation_checkpointing_kwargs", kwargs)
        if (training["activation_checkpointing_kwargs"] or {}).get("use_reentrant"):
            raise ConfigError(
                "training: reentrant checkpointing passes no gradient through frozen layers; "
                "leave use_reentrant out."
            )
        require_deepspeed(training.get("deepspeed"))
        try:
            args = self._settings_class()(
                output_dir=str(self.output),  # type: ignore[attr-defined]
                **training,
                **self._own_arguments(),
            )
        except FlexAlignError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training: {' '.join(str(error).split())}") from error
        require_settings_packages(args)
        return args

    def to_tree(self) -> dict[str, Any]:
        """The recipe in the form of the YAML file, defaults left out."""
        return {
            _YAML_NAMES.get(item.name, item.name): getattr(self, item.name)
            for item in fields(self)
            if getattr(self, item.name) not in (item.default, {})
        }

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults left out."""
        text: str = yaml.safe_dump(self.to_tree(), sort_keys=False, allow_unicode=True)
        return text

    def identity(self) -> dict[str, Any]:
        """Everything in the recipe that decides the trained weights, models and data apart."""
        left_out = ("base", "aligned", "adapter", "data", "output", "training")
        own = {name: getattr(self, name) for name in _names(type(self)) if name not in left_out}
        return {_YAML_NAMES.get(name, name): value for name, value in own.items()} | {
            "training": decisive(self._full_training())
        }

    def _full_training(self) -> dict[str, Any]:
        given: dict[str, Any] = self.training  # type: ignore[attr-defined]
        training = self.default_training | given
        if "num_train_epochs" in given and "max_steps" not in given:
            training["max_steps"] = -1
        return training

    def _settings_class(self) -> Any:
        from flexalign.training.config import TrRaConfig

        return TrRaConfig

    def _own_arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _REALIGNMENT if name in _names(type(self))}

    def _check(self) -> None:
        """Refuse what cannot be, `training` apart, before the trainer's libraries load."""


@dataclass(frozen=True)
class AdaptRecipe(_Recipe):
    """The training of a layer adapter, as a YAML file says it (there, `lam` is ``lambda``).

    Attributes:
        base: Path or known name of the base model, which stays as it is.
        data: Prompts with responses; for ``dpo`` with `chosen` and `rejected`.
        output: Folder of the adapter and its checkpoints.
        method: ``sft``, ``dpo``, or ``trra`` (towards `aligned` at `lam`).
        adapter: Folder of an adapter to go on from; None starts at the identity.
        adapter_layers: Layers of a new adapter.
        strip_thinking: Train on what follows the thinking alone, as the paper's fast mode does.
        aligned: For ``trra``: path or known name of the aligned model.
        lam: For ``trra``: λ of the fused teacher, or a schedule over the training step.
        divergence: For ``trra``: ``reverse``, ``forward`` or ``jsd``.
        beta: For ``trra``: where ``jsd`` lies. (DPO's own β is ``training.beta``.)
        gate: For ``trra``: extrapolate only where base and aligned differ by more.
        chunk_size: For ``trra``: tokens whose logits exist at one time.
        training: Fields of TRL's SFTConfig (DPOConfig for ``dpo``), over
            `DEFAULT_ADAPT_TRAINING`.
    """

    default_training = DEFAULT_ADAPT_TRAINING

    base: str
    data: str
    output: str
    method: Literal["sft", "dpo", "trra"] = "sft"
    adapter: str | None = None
    adapter_layers: int = 1
    strip_thinking: bool = False
    aligned: str | None = None
    lam: float | dict[str, Any] | None = None
    divergence: str = "reverse"
    beta: float = 0.5
    gate: float | None = None
    chunk_size: int = 256
    training: dict[str, Any] = field(default_factory=dict)

    def _settings_class(self) -> Any:
        if self.method == "trra":
            return super()._settings_class()
        import trl

        return trl.DPOConfig if self.method == "dpo" else trl.SFTConfig

    def _own_arguments(self) -> dict[str, Any]:
        if self.method == "trra":
            return super()._own_arguments()
        return {"precompute_ref_log_probs": True} if self.method == "dpo" else {}

    def _full_training(self) -> dict[str, Any]:
        training = super()._full_training()
        if self.method == "dpo" and training.pop("precompute_ref_log_probs", True) is False:
            raise ConfigError(
                "training.precompute_ref_log_probs: false would load a second base; leave it out."
            )
        return training

    def _check(self) -> None:
        if self.adapter_layers < 1:
            raise ConfigError(f"adapter_layers must be at least 1, got {self.adapter_layers}.")
        if self.adapter is not None and self.adapter_layers != 1:
            raise ConfigError("adapter_layers is for a new adapter; leave it out with `adapter`.")
        if self.method == "dpo" and self.strip_thinking:
            raise ConfigError(
                "strip_thinking is for one response per prompt; leave it out with method dpo, or "
                "make the pairs from answers alone."
            )
        if self.method == "trra":
            if self.aligned is None or self.lam is None:
                raise ConfigError("method trra needs `aligned` and `lambda`; add both lines.")
            Schedule.parse(self.lam)
            return
        for name in ("aligned", "lam", "divergence", "beta", "gate", "chunk_size"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                key = _YAML_NAMES.get(name, name)
                raise ConfigError(
                    f"{key} is for method trra; leave it out with method {self.method}, or set "
                    "`method: trra`."
                )


@dataclass(frozen=True)
class BakeRecipe(_Recipe):
    """The baking of a dial's setting into a plain model, as a YAML file says it.

    Attributes:
        base: Path or known name of the base model.
        adapter: Folder of the adapter.
        lam: The setting of the dial, a number.
        data: Prompts with responses; a share of them is held out.
        output: Folder of the plain model.
        held_out: Share of the rows, from 0 to 1, on which the divergence to the dial is measured.
        divergence: ``reverse``, ``forward`` or ``jsd``.
        beta: Where ``jsd`` lies.
        gate: As in equation 5.
        chunk_size: Tokens whose logits exist at one time.
        training: Fields of TRL's SFTConfig, over those of ``realign``.
    """

    default_training = DEFAULT_TRAINING

    base: str
    adapter: str
    lam: float
    data: str
    output: str
    held_out: float = 0.05
    divergence: str = "reverse"
    beta: float = 0.5
    gate: float | None = None
    chunk_size: int = 256
    training: dict[str, Any] = field(default_factory=dict)

    def _own_arguments(self) -> dict[str, Any]:
        return super()._own_arguments() | {"eval_on_start": True}

    def _check(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, got {self.held_out}.")
        finite_lambda(self.lam, "lambda")


def _names(recipe: type) -> list[str]:
    return [item.name for item in fields(recipe)]
