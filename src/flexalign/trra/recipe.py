"""The recipe of a realignment: one YAML file, typed, with overrides."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from flexalign.errors import ConfigError, FlexAlignError
from flexalign.schedules import Schedule
from flexalign.trra.settings import check_settings, one_for_each_lambda, read_tree
from flexalign.trra.watch import Watch, parse_watch

__all__ = ["DEFAULT_TRAINING", "Recipe", "Watch", "decisive", "parse_training"]

DEFAULT_TRAINING: dict[str, Any] = {
    "max_steps": 200,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_length": 8192,
    "logging_steps": 5,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
}
"""Where ``training`` differs from TRL's defaults: the paper's run (200 steps, batch 16, lr 2e-5,
cosine, warm-up over the first tenth) and two checkpoints kept."""

_YAML_NAMES = {"lam": "lambda"}
_TOP_LEVEL = (
    *("lam", "divergence", "beta", "gate", "chunk_size", "teacher", "rounds"),
    *("rollouts", "rollout_objective", "rollout_max_new_tokens"),
)
_WITHOUT_INFLUENCE = ("logging_", "save_", "report_to", "run_name", "disable_tqdm", "dataloader_")
"""How the fields begin that change what is shown or kept, not what is learned."""


@dataclass(frozen=True)
class Recipe:
    """A realignment, as a YAML file says it (there, `lam` is called ``lambda``).

    Attributes:
        reference: Path or known name of the reference model, λ=0.
        aligned: Path or known name of the aligned model, λ=1, or of a PEFT adapter on the
            reference.
        data: Traces: prompts with responses, as JSONL, JSON, Parquet or a saved data set.
        output: Folder of the realigned model and its checkpoints.
        lam: λ of the fused teacher (equation 5), or a schedule over the training step.
        divergence: ``reverse``, ``forward`` or ``jsd``.
        beta: Where ``jsd`` lies, 0 forward to 1 reverse.
        gate: τ: extrapolate only where the pair differs by more; None for the paper's form.
        chunk_size: Tokens whose logits exist at one time.
        rounds: 1 is TrRa; k is TrRa-iter, k realignments of the reference.
        teacher: ``online``, or ``cached``: both models run over the data once, and training reads
            their hidden states.
        cache_dir: Folder of those; None: beside `output`, with ``-cache`` at its end.
        rollouts: Share of the batches whose responses the student samples, 0 to 1.
        rollout_objective: What those minimise: ``token``, the divergence to equation 5, or
            ``sequence``, the reverse KL of whole responses.
        rollout_max_new_tokens: Where a sample is cut off; None: by ``training.max_length``.
        allow_pickle: Permit pickled weights, whose loading can run code.
        lora: Fields of ``peft.LoraConfig`` for a LoRA student; None trains all weights.
        merge: Save a LoRA student as a plain model too, in ``output/merged``.
        watch: What is measured during training; None for nothing.
        training: Fields of ``trl.SFTConfig``, over `DEFAULT_TRAINING`.
    """

    reference: str
    aligned: str
    data: str
    output: str
    lam: float | dict[str, Any]
    divergence: str = "reverse"
    beta: float = 0.5
    gate: float | None = None
    chunk_size: int = 256
    rounds: int = 1
    teacher: str = "online"
    cache_dir: str | None = None
    rollouts: float = 0.0
    rollout_objective: str = "token"
    rollout_max_new_tokens: int | None = None
    allow_pickle: bool = False
    lora: dict[str, Any] | None = None
    merge: bool = False
    watch: Watch | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        **settings: Any,
    ) -> "Recipe":
        """Read a recipe.

        Args:
            path: The YAML file.
            overrides: ``key=value`` texts with dotted keys, the value as YAML.
            **settings: Top-level values that win over both, by Python name; None is ignored.

        Raises:
            ConfigError: If the file cannot be read, a key is unknown (the nearest known one is
                named), a value has a wrong type, or this version cannot do what is asked.
            LambdaError: If λ is not a finite number or a schedule.
        """
        return cls.parse(read_tree(path, overrides, _by_yaml_name(settings)))

    @classmethod
    def load_each(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        **settings: Any,
    ) -> "list[Recipe]":
        """Read a recipe with one λ or a list of them: one recipe for each λ.

        With several, each writes to ``OUTPUT/lambda=0.5``, and all share one cache.

        Args:
            path: As in `load`, like the others.
            overrides: Likewise.
            **settings: Likewise; `lam` may be a list.

        Raises:
            ConfigError: As `load`, or if a λ is there twice or is no number.
            LambdaError: As `load`.
        """
        tree = read_tree(path, overrides, _by_yaml_name(settings))
        return [cls.parse(each) for each in one_for_each_lambda(tree)]

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> "Recipe":
        """Check a mapping in the form of the YAML file; raises as `load` does."""
        if isinstance(tree.get("lambda"), list):
            raise ConfigError(
                f"lambda: one λ in a run, got {len(tree['lambda'])}; read several with "
                "Recipe.load_each, as flexalign realign does."
            )
        hints = get_type_hints(cls)
        hints |= {"watch": dict[str, Any] | None, "training": dict[str, Any] | None}
        wanted = {_YAML_NAMES.get(name, name): hint for name, hint in hints.items()}
        required = [
            _YAML_NAMES.get(item.name, item.name)
            for item in fields(cls)
            if item.default is MISSING and item.default_factory is MISSING
        ]
        given = check_settings(tree, wanted, "", required)
        given["lam"] = given.pop("lambda")
        Schedule.parse(given["lam"])
        if given.get("watch") is not None:
            given["watch"] = parse_watch(given["watch"])
        from trl import SFTConfig  # seconds: what needs no trainer is refused by now

        given["training"] = parse_training(given.get("training"), SFTConfig)
        recipe = cls(**given)
        recipe._check()
        return recipe

    def training_arguments(self, output: str | Path) -> Any:
        """Build the trainer's settings, a ``TrRaConfig`` that writes to `output`.

        Raises:
            ConfigError: If a value is out of its range.
        """
        import torch

        from flexalign.trra.config import TrRaConfig

        training = DEFAULT_TRAINING | self.training
        if "num_train_epochs" in self.training and "max_steps" not in self.training:
            training["max_steps"] = -1
        accelerated = torch.accelerator.is_available()
        training.setdefault("dataloader_pin_memory", accelerated)
        # Otherwise several processes without an accelerator would each train alone.
        training.setdefault("use_cpu", not accelerated)
        own = {name: getattr(self, name) for name in _TOP_LEVEL}
        own["allow_pickle"] = self.allow_pickle
        if self.teacher == "cached":
            own["cache_dir"] = self.cache_folder
        try:
            return TrRaConfig(output_dir=str(output), **training, **own)
        except FlexAlignError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training: {' '.join(str(error).split())}") from error

    @property
    def cache_folder(self) -> str:
        """Where the teachers' hidden states are, or would be."""
        return self.cache_dir or f"{self.output.rstrip('/')}-cache"

    def peft_config(self) -> Any:
        """Build the LoRA settings, or None where all weights are trained.

        Raises:
            ConfigError: If PEFT refuses them.
        """
        if self.lora is None:
            return None
        from peft import LoraConfig

        try:
            return LoraConfig(
                **({"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | self.lora)
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"lora: {' '.join(str(error).split())}") from error

    def to_tree(self) -> dict[str, Any]:
        """The recipe in the form of the YAML file, defaults left out."""
        tree = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default and value != {}:
                tree[_YAML_NAMES.get(item.name, item.name)] = value
        if self.watch is not None:
            tree["watch"] = asdict(self.watch)
        return tree

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults left out."""
        text: str = yaml.safe_dump(self.to_tree(), sort_keys=False, allow_unicode=True)
        return text

    def identity(self) -> dict[str, Any]:
        """Everything in the recipe that decides the trained weights."""
        kept = decisive(DEFAULT_TRAINING | self.training)
        own = {_YAML_NAMES.get(name, name): getattr(self, name) for name in _TOP_LEVEL}
        return own | {"lora": self.lora, "training": kept}

    def _check(self) -> None:
        if self.lora is not None:
            from peft import LoraConfig

            check_settings(self.lora, get_type_hints(LoraConfig), "lora")
        elif self.merge:
            raise ConfigError("merge is for a LoRA student; add `lora:` or leave merge out.")
        self.training_arguments(self.output)
        self.peft_config()


def _by_yaml_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {_YAML_NAMES.get(name, name): value for name, value in settings.items()}


def decisive(training: Mapping[str, Any]) -> dict[str, Any]:
    """What of a ``training`` section decides the trained weights.

    Of the batch that is the rows of a step alone, ``rows_per_step``: over how many processes and
    passes they are spread may change when a run goes on.
    """
    kept = {
        name: value for name, value in training.items() if not name.startswith(_WITHOUT_INFLUENCE)
    }
    rows = [
        kept.pop(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    ]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return kept | {"rows_per_step": math.prod(rows) * processes}


def parse_training(values: object, settings: Any) -> dict[str, Any]:
    """Check the ``training`` section against a trainer's settings, such as ``trl.SFTConfig``.

    Raises:
        ConfigError: If a key is unknown, a value has a wrong type, or the run could not be resumed.
    """
    hints = get_type_hints(settings)
    wanted = {item.name: hints[item.name] for item in fields(settings) if item.init}
    training = check_settings(values or {}, wanted, "training")
    if "output_dir" in training:
        raise ConfigError("training.output_dir is the recipe's `output`; set that instead.")
    if training.get("save_only_model"):
        raise ConfigError(
            "training.save_only_model: such a run could not be resumed; leave it out."
        )
    if training.get("save_total_limit") == 1:
        raise ConfigError(
            "training.save_total_limit: 1 would delete the last complete checkpoint before the "
            "next is written; keep at least 2."
        )
    return training
