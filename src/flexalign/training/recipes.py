"""Recipes: the settings of a training run. One YAML file, one schema, each key declared once.

The declaration of a key gives its type, its default, and a description. The description is also
the help text of the command line and the row in the docs. The keys of ``training`` and ``lora`` are
the fields of TRL's and PEFT's classes.

A recipe's own keys are checked before torch is imported.
"""

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_type_hints

import yaml
from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from flexalign.data.columns import check_columns
from flexalign.errors import ConfigError, FlexAlignError, LambdaError
from flexalign.lambdas import (
    Fixed,
    LambdaRange,
    Schedule,
    TrainingLambda,
    outside_range,
    parse_training_lambda,
)
from flexalign.training.settings import (
    Number,
    Section,
    as_number,
    as_yaml,
    check_settings,
    read_tree,
)

if TYPE_CHECKING:
    from flexalign.data.prompting import PromptSettings
    from flexalign.models.prompted import PromptedModel, PromptPair


class WatchSettings(Section):
    """What is measured during training: the student's answers to a few prompts."""

    section: ClassVar[str] = "watch"

    prompts: str = Field(
        description="File of prompts; rows with an `answer` give an accuracy too.",
        examples=["questions.jsonl"],
    )
    columns: dict[str, Any] | None = Field(
        None, description="The file's own names for fields, such as {problem: QUERY}."
    )
    every_steps: int = Field(
        50,
        description="Steps between two measurements; the untrained student comes before step 0.",
    )
    limit: int = Field(32, description="Prompts used, the first ones of the file.")
    max_new_tokens: int = Field(
        512, description="Where an answer is cut off; it then counts as truncated."
    )
    temperature: Number = Field(1.0, description="Of sampling; 0 is greedy.")
    batch_size: int = Field(32, description="Prompts answered at one time.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_columns(self.columns)
        for name in ("every_steps", "limit", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"watch.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"watch.temperature must be a number ≥ 0 (0 is greedy), got {self.temperature}."
            )
        return self


def _read_watch(value: object) -> WatchSettings | None:
    return (
        value if value is None or isinstance(value, WatchSettings) else WatchSettings.parse(value)
    )


def _read_mapping(value: object) -> object:
    """Return a section's mapping; a section without content (``training:``) is an empty mapping."""
    return {} if value is None else value


# λ is parsed here, once. All later code has a schedule over the training step, or a range.


def _read_lambda(value: object) -> TrainingLambda:
    value = as_number(value)
    if isinstance(value, Schedule | LambdaRange | Fixed):
        return parse_training_lambda(value)
    if isinstance(value, str) and ":" in value:
        # Other readers of YAML 1.1 take 1:5 for the number 65, so no text is a range here.
        raise ConfigError(f"lambda: write a range as {{low: 0, high: 5}}, got {value!r}.")
    if isinstance(value, bool) or not isinstance(value, int | float | Mapping):
        raise ConfigError(f"lambda must be a number or a mapping, got {value!r}.")
    try:
        return parse_training_lambda(value)
    except (ConfigError, LambdaError) as error:
        message = str(error)
        if not message.startswith("lambda"):
            message = f"lambda: {message}"
        raise type(error)(message) from error


def _read_optional_lambda(value: object) -> Schedule | None:
    if value is None:
        return None
    schedule = _read_lambda(value)
    if isinstance(schedule, LambdaRange):
        raise ConfigError(
            f"lambda: a range ({schedule}) is for a LoRA of flexalign realign; a layer adapter has "
            "its own dial, so give its teacher one λ, such as 1."
        )
    return schedule


def _read_single_lambda(value: object) -> Schedule:
    if isinstance(value, LambdaRange | list) or (isinstance(value, Mapping) and "low" in value):
        raise ConfigError(
            "lambda must be a number, got several λ or a range; a plain model has one, so bake each "
            "λ into an output of its own."
        )
    schedule = None if isinstance(value, Mapping | bool) else _read_lambda(value)
    if not isinstance(schedule, Schedule) or schedule.kind != "constant":
        raise ConfigError(f"lambda must be a number, got {value!r}.")
    return schedule


# What a pair of models may differ in.

ByID = Annotated[
    bool,
    Field(
        description="Take special tokens of the two models that differ in name alone, at equal ids, "
        "for the same; the reference's names are used."
    ),
]
"""The key of both recipes that read a pair."""


# The sides of a pair: a model, or a model under a prompt of its own.


def _read_side(value: object, side: str) -> "str | PromptedModel":
    """Return a side without a prompt as text, its path or name, any other as `PromptedModel`."""
    if isinstance(value, str | Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | list):
        raise ConfigError(
            f"{side} must be text, a model's path or name, or a mapping {{model, system, template}}, "
            f"got {value!r}."
        )
    # Imported here because it needs torch, which a recipe without prompts does not.
    from flexalign.models.prompted import PromptedModel

    read = PromptedModel.parse(value, side)
    return read if read.has_prompt else read.model


def with_prompts(
    tree: Mapping[str, Any],
    reference: "PromptSettings | None" = None,
    aligned: "PromptSettings | None" = None,
) -> dict[str, Any]:
    """Give the sides of a recipe's tree other prompts, as the command line's options do.

    Args:
        tree: A recipe in the form of the YAML file; not changed. Without `aligned`, the aligned side
            is the reference's model.
        reference: The reference's prompt instead of its own; None: no change.
        aligned: The aligned side's, likewise.

    Returns:
        A new tree.
    """
    from flexalign.models.prompted import prompt_json

    changed = dict(tree)
    models = {
        side: given.get("model") if isinstance(given := tree.get(side), Mapping) else given
        for side in ("reference", "aligned")
    }
    for side, prompt in (("reference", reference), ("aligned", aligned)):
        model = models[side] or models["reference"]
        if prompt is not None and model is not None:
            changed[side] = {"model": model, **prompt_json(prompt)}
    return changed


# The sections that belong to TRL and PEFT.

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

DEFAULT_ADAPT_TRAINING: dict[str, Any] = {
    **{name: value for name, value in DEFAULT_TRAINING.items() if name != "max_steps"},
    "num_train_epochs": 3,
    "max_length": 4096,
}
"""Where ``training`` differs from TRL's defaults in ``adapt``: the paper's three epochs at a
learning rate of 2e-5 and a cut-off of 4096 tokens, the rest as in ``realign``."""

_NOT_READ = {
    "resume_from_checkpoint": "a run goes on from the newest complete checkpoint in `output`",
    "do_predict": "a run ends with its training; flexalign evaluate measures the result",
    **dict.fromkeys(
        ("rounds", "cache_dir", "allow_pickle", "by_id"),
        "it is no field of TRL's, and `training` has those alone",
    ),
}
"""Fields of a trainer's settings that a run does not read, each with the reason."""

_OF_EVALUATION = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval")
"""Fields about rows that are held out, which only a recipe of ``bake`` has."""

_WITHOUT_INFLUENCE = ("logging_", "save_", "report_to", "run_name", "disable_tqdm", "dataloader_")
"""Prefixes of the fields that change what is logged or saved, and not the trained weights."""


def parse_training(values: object, settings: Any) -> dict[str, Any]:
    """Check the ``training`` section against a trainer's settings, such as ``trl.SFTConfig``.

    Raises:
        ConfigError: If a key is unknown, a value has a wrong type, or the run could not be resumed.
    """
    hints = get_type_hints(settings)
    wanted = {item.name: hints[item.name] for item in fields(settings) if item.init}
    training = check_settings(values or {}, wanted, "training")
    for name, reason in _NOT_READ.items():
        if training.get(name):
            raise ConfigError(f"training.{name} has no effect: {reason}; leave it out.")
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


def decisive(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a ``training`` section that decides the trained weights.

    Of the batch size, only the rows of one step count (``rows_per_step``). The number of processes
    and of accumulation passes may change when a run is resumed.
    """
    kept = {
        name: value for name, value in training.items() if not name.startswith(_WITHOUT_INFLUENCE)
    }
    rows = [
        kept.pop(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    ]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return kept | {"rows_per_step": math.prod(rows) * processes}


# The three recipes, and what they share.


def one_for_each_lambda(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a recipe with a list of λ into one recipe for each λ.

    Each recipe has its own output folder. All share one cache folder.

    Args:
        tree: A recipe in the form of the YAML file. With one λ, a copy of it is returned.

    Raises:
        ConfigError: If the list is empty, or if a λ occurs twice or is not a number.
    """
    lams = tree.get("lambda")
    if not isinstance(lams, list):
        return [dict(tree)]
    values = [lam.lam if isinstance(lam, Fixed) else lam for lam in lams]
    if any(isinstance(lam, bool) or not isinstance(lam, int | float) for lam in values):
        raise ConfigError(f"lambda: a list of λ holds numbers, got {values!r}.")
    names = [f"lambda={lam:g}" for lam in values]
    if not lams or len(set(names)) < len(names):
        raise ConfigError(f"lambda: name each λ of a list once, and one at least, got {values!r}.")

    output = str(tree.get("output", "")).rstrip("/")
    shared = {"cache_dir": tree.get("cache_dir") or f"{output}-cache"}
    return [
        {**tree, **shared, "lambda": lam, "output": f"{output}/{name}"}
        for lam, name in zip(lams, names, strict=True)
    ]


_LOSS = ("divergence", "beta", "gate", "chunk_size")
_PROMPTING = ("template", "system", "thinking")


class Recipe(Section):
    """The settings that all training runs have.

    A key that several recipes have is declared here. A recipe adds its own keys, gives all of them
    an order, and says in `meaning` where a key stands for something else than here.

    Attributes:
        schedule: λ over the training step, or the range of a LoRA dial. None for a method without
            λ.
        training: The trainer's settings that the file sets.
    """

    default_training: ClassVar[dict[str, Any]] = DEFAULT_TRAINING
    deciding: ClassVar[tuple[str, ...]] = ()
    """Keys that decide the trained weights, in addition to the models, the data and `training`."""
    order: ClassVar[tuple[str, ...]] = ()
    """All fields, in the order in which help texts, docs and saved recipes list them."""
    meaning: ClassVar[Mapping[str, str]] = {}
    """The description of inherited fields that stand for something else in this recipe."""
    example: ClassVar[Mapping[str, Any]] = {}
    """The example values of inherited fields in this recipe."""
    holds_out: ClassVar[bool] = False
    """Whether a run evaluates rows that it does not train on."""

    data: str = Field(description="Prompts with responses.", examples=["traces.jsonl"])
    columns: dict[str, Any] | None = Field(
        None,
        description="The data's own names for fields, such as {prompt: QUERY, completion: REPLY}; "
        "all other columns are then left out. Null: the known names.",
    )
    output: str = Field(
        description="Folder of the model and its checkpoints: one run; started again, it goes on."
    )
    schedule: Annotated[TrainingLambda | None, PlainValidator(_read_optional_lambda)] = Field(
        None, alias="lambda", description="λ of the fused teacher, or a schedule over the step."
    )
    divergence: str = Field(
        "reverse",
        description="`reverse`, KL(student‖teacher), the paper's; `forward`, or `jsd` (with "
        "`beta`).",
    )
    beta: Number = Field(0.5, description="Where `jsd` lies: 0 is forward, 1 reverse.")
    gate: Number | None = Field(
        None,
        description="τ: go beyond [0, 1] only at tokens where the two models differ by more, such "
        "as 0.01; null for the paper's form.",
    )
    chunk_size: int = Field(256, description="Tokens whose logits exist at one time.")
    template: dict[str, Any] | None = Field(
        None,
        description="Arguments of the chat template, such as {enable_thinking: false}; what was "
        "sampled with others is refused. Null: none.",
    )
    system: str | None = Field(
        None, description="The system message of conversations that have none."
    )
    thinking: dict[str, Any] | None = Field(
        None,
        description="The markers around the thinking, {open: TEXT, close: TEXT}; null: those that "
        "the chat template or the vocabulary shows.",
    )
    training: Annotated[dict[str, Any], BeforeValidator(_read_mapping)] = Field(
        default_factory=dict,
        description="Any field of trl.SFTConfig. By default `DEFAULT_TRAINING`.",
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if not cls.order:
            return
        declared = dict(cls.model_fields)
        if sorted(cls.order) != sorted(declared):
            wrong = sorted(set(cls.order) ^ set(declared))
            raise TypeError(f"{cls.__name__}.order and its fields differ: {', '.join(wrong)}.")

        cls.model_fields.clear()
        for name in cls.order:
            field = cls.model_fields[name] = declared[name]
            field.description = cls.meaning.get(name, field.description)
            if name in cls.example:
                field.examples = [cls.example[name]]

    def __init__(self, **values: Any) -> None:
        super().__init__(**_by_key(values))

    @property
    def lam(self) -> Any:
        """λ in its JSON form: a number, a mapping, or None."""
        return None if self.schedule is None else self.schedule.to_json()

    @property
    def has_idle_gate(self) -> bool:
        """Whether there is a gate, and no λ that it is about."""
        lam = self.schedule
        return self.gate is not None and lam is not None and outside_range(lam, (0, 1)) is None

    @classmethod
    def load(cls, path: str | Path, *, overrides: Sequence[str] = (), **given: Any) -> Self:
        """Read a recipe.

        Args:
            path: The YAML file.
            overrides: ``key=value`` texts with dotted keys, the value as YAML.
            **given: Top-level values by Python name. They override both; None is ignored.

        Raises:
            ConfigError: If the file cannot be read, or as in `parse`.
            LambdaError: As in `parse`.
        """
        return cls.parse(read_tree(path, overrides, _by_key(given)))

    @classmethod
    def of(cls, given: "str | Path | Mapping[str, Any] | Recipe") -> Self:
        """Return the recipe of a file's path, of a mapping in the form of the file, or of a recipe.

        Raises:
            ConfigError: As in `load`, or if it is a recipe of another command.
            LambdaError: As in `load`.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, Recipe):
            raise ConfigError(f"this takes a {cls.__name__}, got a {type(given).__name__}.")
        return cls.load(given) if isinstance(given, str | Path) else cls.parse(given)

    @cached_property
    def arguments(self) -> Any:
        """The trainer's settings, built once; they write to `output`.

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
        self._settle(training, accelerated=accelerated)
        require_deepspeed(training.get("deepspeed"))

        try:
            arguments = self._settings_class()(
                output_dir=self.output, **training, **self._own_arguments()
            )
        except FlexAlignError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"training: {' '.join(str(error).split())}") from error
        require_settings_packages(arguments)
        return arguments

    @cached_property
    def prompting(self) -> "PromptSettings":
        """How prompts are rendered: the keys `template`, `system` and `thinking`."""
        from flexalign.data.prompting import PromptSettings

        return PromptSettings.parse(self.template, self.system, self.thinking)

    def training_arguments(self, output: str | Path | None = None) -> Any:
        """Return a copy of the trainer's settings, which writes to a folder of its own if given."""
        arguments = copy.copy(self.arguments)
        if output is not None:
            arguments.output_dir = str(output)
        return arguments

    def to_tree(self) -> dict[str, Any]:
        """Return the recipe in the form of the YAML file, defaults left out."""
        tree = {}
        for key, name in self.keys().items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and value != {}:
                tree[key] = plain_value(value)
        return tree

    def to_yaml(self) -> str:
        """Return the recipe as YAML, defaults left out; whole numbers have no point."""
        tree = _without_points(self.to_tree())
        text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        return text

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the trained weights, for `run.json`."""
        keys = self.keys()
        own = {key: plain_value(getattr(self, keys[key])) for key in self.deciding}
        # Left out if not set, so that runs from before these keys existed can be resumed.
        own |= {name: value for name in _PROMPTING if (value := getattr(self, name)) is not None}
        return own | {"training": decisive(self._identifying_training())}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_keys()
        self.prompting  # noqa: B018 - reading the keys checks them
        check_columns(self.columns)
        # Importing the trainers takes seconds, so the keys that need none are checked before.
        self.training.update(parse_training(self.training, self._settings_class()))
        for name in () if self.holds_out else _OF_EVALUATION:
            if self.training.get(name, "no") not in (None, False, 0, "no"):
                raise ConfigError(
                    f"training.{name} is about rows that are held out, and this run trains on all; "
                    "leave it out, and measure the result with flexalign evaluate."
                )
        self._check_sections()
        return self

    def _check_keys(self) -> None:
        """Check the recipe's own keys, before the trainer's libraries are imported."""

    def _check_sections(self) -> None:
        """Check what only the trainer's libraries can check."""
        self.arguments  # noqa: B018 - building them checks them

    def _full_training(self) -> dict[str, Any]:
        training = self.default_training | self.training
        if "num_train_epochs" in self.training and "max_steps" not in self.training:
            training["max_steps"] = -1
        return training

    def _identifying_training(self) -> dict[str, Any]:
        return self._full_training()

    def _settle(self, training: dict[str, Any], *, accelerated: bool) -> None:
        """Set fields whose default depends on the machine, in place."""

    def _settings_class(self) -> Any:
        from flexalign.training.config import TrRaConfig

        return TrRaConfig

    def _own_arguments(self) -> dict[str, Any]:
        """Return the trainer's settings that are keys of the file itself."""
        return {"lam": self.schedule} | {
            name: getattr(self, name) for name in ("divergence", "beta", "gate", "chunk_size")
        }


def _by_key(given: Mapping[str, Any]) -> dict[str, Any]:
    """Rename values from Python names to the keys of the file."""
    return {("lambda" if name == "lam" else name): value for name, value in given.items()}


def _with_lambda(tree: Mapping[str, Any], is_needed: bool) -> Mapping[str, Any]:
    """Return a recipe's mapping, with λ = 1 where it has none and needs none."""
    if is_needed or tree.get("lambda") is not None:
        return tree
    return {**tree, "lambda": 1.0}


def plain_value(value: Any) -> Any:
    """Return a value in the form of the YAML file."""
    if hasattr(value, "to_json"):
        return value.to_json()
    return value.model_dump() if isinstance(value, Section) else value


def _without_points(value: Any) -> Any:
    """Return a value in which whole numbers below a million are integers, as a person writes them."""
    if isinstance(value, Mapping):
        return {key: _without_points(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_points(one) for one in value]
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e6
    return int(value) if is_whole else value


IDLE_GATE = "gate has no effect: it is about λ outside [0, 1], and this run has none."
"""Said of a recipe whose gate is idle."""


class RealignRecipe(Recipe):
    """A realignment: a student learns the fusion of a reference and an aligned model (TrRa)."""

    deciding: ClassVar[tuple[str, ...]] = (
        "lambda",
        *_LOSS,
        *("teacher", "rounds", "rollouts", "rollout_objective", "rollout_max_new_tokens", "lora"),
    )
    order: ClassVar[tuple[str, ...]] = (
        *("reference", "aligned", "by_id", "data", "columns", "output", "schedule"),
        *_LOSS,
        *("rounds", "teacher", "cache_dir"),
        *("rollouts", "rollout_objective", "rollout_max_new_tokens"),
        *("allow_pickle", "lora", "merge", "watch"),
        *_PROMPTING,
        "training",
    )
    meaning: ClassVar[Mapping[str, str]] = {
        "data": "Traces, prompts with responses (flexalign sample): JSONL, JSON, CSV (also .gz), "
        "Parquet, a folder of shards or a saved data set; FOLDER/train is a split.",
    }
    example: ClassVar[Mapping[str, Any]] = {"output": "out/realigned"}

    reference: Annotated[Any, PlainValidator(partial(_read_side, side="reference"))] = Field(
        description="λ = 0, and where the student starts: a model's path, hub id or known name, or {model, "
        "system, template}, a model under a prompt, under which the student is asked too.",
        examples=["miniature:reference"],
    )
    aligned: Annotated[Any, PlainValidator(partial(_read_side, side="aligned"))] = Field(
        description="λ = 1: a model's path, hub id or known name, a PEFT adapter on the reference, or "
        "{model, system, template}, perhaps the reference's model under another prompt.",
        examples=["miniature:aligned"],
    )
    schedule: Annotated[TrainingLambda, PlainValidator(_read_lambda)] = Field(
        alias="lambda",
        description="λ of the fused teacher (equation 5): a number, a list of numbers (a student "
        "for each), a schedule over the step, {kind: linear, start: 0, end: 2, steps: 200}, or, "
        "with `lora`, a range, {low: 0, high: 5}: one LoRA for every λ in it.",
        examples=[2.0],
    )
    by_id: ByID = False
    rounds: int = Field(
        1,
        description="1 is TrRa; k is TrRa-iter: each round takes the last one's result as aligned.",
    )
    teacher: str = Field(
        "online",
        description="`online`, or `cached`: both models run over the data once (flexalign cache), "
        "and training reads their hidden states.",
    )
    cache_dir: str | None = Field(
        None, description="Folder of those; null: beside `output`, with `-cache` at its end."
    )
    rollouts: Number = Field(
        0.0, description="Share of the batches, 0 to 1, whose responses the student samples."
    )
    rollout_objective: str = Field(
        "token",
        description="What those minimise: `token`, the divergence to equation 5; `sequence`, the "
        "reverse KL of whole responses; or `sampled`, the aim of `token` with the reward of the "
        "sampled token alone.",
    )
    rollout_max_new_tokens: int | None = Field(
        None, description="Where a sample is cut off; null: by `training.max_length`."
    )
    allow_pickle: bool = Field(
        False, description="Permit pickled weights, whose loading can run code."
    )
    lora: dict[str, Any] | None = Field(
        None,
        description="Fields of peft.LoraConfig for a LoRA student; null trains all weights.",
        examples=[{"r": 16}],
    )
    merge: bool = Field(
        False, description="Save a LoRA student as a plain model too, in `output`/merged."
    )
    watch: Annotated[WatchSettings | None, PlainValidator(_read_watch)] = Field(
        None, description="The student answers prompts while it learns; null: it does not."
    )

    @classmethod
    def parse(cls, tree: Any) -> Self:
        """Check a mapping in the form of the YAML file, with one λ; raises as in `load`."""
        if isinstance(tree, Mapping) and isinstance(tree.get("lambda"), list):
            raise ConfigError(
                f"lambda: one λ in a run, got {len(tree['lambda'])}; read several with "
                "Recipe.load_each, as flexalign realign does."
            )
        return super().parse(tree)

    @classmethod
    def load_each(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        needs_lambda: bool = True,
        **given: Any,
    ) -> list[Self]:
        """Read a recipe with one λ or a list of them: one recipe for each λ.

        With several, each writes to ``OUTPUT/lambda=0.5``, and all share one cache.

        Args:
            path: As in `load`.
            overrides: As in `load`.
            needs_lambda: Whether the recipe must have a λ. If not, one without it gets λ = 1, for
                what does not depend on λ.
            **given: As in `load`; `lam` may be a list. `reference_prompt` and `aligned_prompt` are
                prompts of the two sides, instead of the recipe's; see `with_prompts`.

        Raises:
            ConfigError: As in `load`, or if a λ occurs twice or is not a number.
            LambdaError: As in `load`.
        """
        prompts = [given.pop(f"{side}_prompt", None) for side in ("reference", "aligned")]
        tree = read_tree(path, overrides, _by_key(given))
        if any(prompt is not None for prompt in prompts):
            tree = with_prompts(tree, *prompts)
        return [cls.parse(each) for each in one_for_each_lambda(_with_lambda(tree, needs_lambda))]

    @classmethod
    def each(cls, given: Any, *, needs_lambda: bool = True) -> list[Self]:
        """Return one recipe for each λ.

        Args:
            given: As in `of`, or a list of such values.
            needs_lambda: As in `load_each`.
        """
        if isinstance(given, list | tuple):
            return [cls.of(each) for each in given]
        if isinstance(given, Recipe):
            return [cls.of(given)]
        if isinstance(given, str | Path):
            return cls.load_each(given, needs_lambda=needs_lambda)
        if not isinstance(given, Mapping):
            return [cls.parse(given)]  # raises, and says what is wrong with the value
        given = _with_lambda(given, needs_lambda)
        return [cls.parse(each) for each in one_for_each_lambda(given)]

    @cached_property
    def models(self) -> tuple[str, str]:
        """The models of the two sides, without their prompts."""
        one, other = (getattr(side, "model", side) for side in (self.reference, self.aligned))
        return one, other

    @property
    def sides(self) -> tuple[str, str]:
        """The two sides as text, for messages and cards: each model, with its prompt if it has one."""
        one, other = (getattr(side, "text", side) for side in (self.reference, self.aligned))
        return one, other

    @cached_property
    def prompts(self) -> "PromptPair | None":
        """The prompts of the two sides; None if neither has one.

        The keys `template` and `system` hold for both sides, and a side's own stand beside them.

        Raises:
            ConfigError: If a side and `template` give one argument two values.
        """
        if isinstance(self.reference, str) and isinstance(self.aligned, str):
            return None
        from flexalign.models.prompted import PromptedModel, PromptPair

        sides = [PromptedModel.parse(side) for side in (self.reference, self.aligned)]
        for name, side in zip(("reference", "aligned"), sides, strict=True):
            for key, value in (self.template or {}).items():
                if side.prompt.template.get(key, value) != value:
                    raise ConfigError(
                        f"template.{key} is {value!r} for both sides, and {name}.template.{key} is "
                        f"{side.prompt.template[key]!r}; leave one of the two out."
                    )
        return PromptPair(sides[0].prompt, sides[1].prompt)

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the trained weights; the models go by fingerprint."""
        told = super().identity()
        return told if self.prompts is None else told | {"prompts": self.prompts.to_json()}

    @property
    def cache_folder(self) -> str:
        """The folder of the teachers' hidden states, whether or not it exists."""
        return self.cache_dir or f"{self.output.rstrip('/')}-cache"

    def peft_config(self) -> Any:
        """Build the LoRA settings; None if all weights are trained.

        PEFT changes a configuration that it uses, so each call returns a new one.

        Raises:
            ConfigError: If PEFT refuses the settings.
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

    @property
    def lambda_range(self) -> LambdaRange | None:
        """The range of a LoRA dial; None for a student of one λ."""
        return self.schedule if isinstance(self.schedule, LambdaRange) else None

    def _check_keys(self) -> None:
        self.prompts  # noqa: B018 - reading them checks them
        if self.lambda_range is not None:
            self._check_range(self.lambda_range)
        if self.by_id and self.models[0] == self.models[1]:
            raise ConfigError("by_id is about two models, and both sides are one; leave it out.")
        if self.merge and self.lora is None:
            raise ConfigError("merge is for a LoRA student; add `lora:` or leave merge out.")

    def _check_range(self, asked: LambdaRange) -> None:
        if self.lora is None:
            raise ConfigError(
                f"lambda: a range ({asked}) trains one LoRA whose strength is λ; add `lora: {{r: "
                "32}`, or give one λ."
            )
        if self.rounds != 1:
            raise ConfigError(
                f"rounds with a range of λ ({asked}): the LoRA's strength reaches every λ of it in "
                "one round; leave rounds out."
            )
        if self.merge:
            raise ConfigError(
                f"merge with a range of λ ({asked}): a plain model has one λ; leave merge out and "
                "make it with flexalign bake, at a λ of the range."
            )

    def _check_sections(self) -> None:
        if self.lora is not None:
            from peft import LoraConfig

            check_settings(self.lora, get_type_hints(LoraConfig), "lora")
        super()._check_sections()
        settings = self.peft_config()
        if self.lambda_range is not None:
            from flexalign.lora_dial.scaling import require_linear

            require_linear(settings, "lora")
        if self.prompts is not None:
            from flexalign.training.rows import require_responses

            require_responses(self.arguments)

    def _identifying_training(self) -> dict[str, Any]:
        # Earlier versions recorded `max_steps: 200` here even where epochs decide. Such runs must
        # still be recognised as the same run, so that they can be resumed.
        return self.default_training | self.training

    def _own_arguments(self) -> dict[str, Any]:
        names = ("teacher", "rounds", "rollouts", "rollout_objective", "rollout_max_new_tokens")
        own = super()._own_arguments() | {name: getattr(self, name) for name in names}
        own |= {"allow_pickle": self.allow_pickle, "by_id": self.by_id}
        return own | ({"cache_dir": self.cache_folder} if self.teacher == "cached" else {})


class _AdapterRecipe(Recipe):
    """The settings that the recipes with a layer adapter share: precision and checkpointing."""

    base: str = Field(
        description="The base model's path, hub id or known name.", examples=["miniature"]
    )

    def _settle(self, training: dict[str, Any], *, accelerated: bool) -> None:
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


class AdaptRecipe(_AdapterRecipe):
    """The training of a layer adapter (InRa). The base does not change."""

    default_training: ClassVar[dict[str, Any]] = DEFAULT_ADAPT_TRAINING
    deciding: ClassVar[tuple[str, ...]] = (
        *("method", "adapter_layers", "strip_thinking", "lambda"),
        *_LOSS,
    )
    order: ClassVar[tuple[str, ...]] = (
        *("base", "data", "columns", "output", "method"),
        *("adapter", "adapter_layers", "strip_thinking"),
        *("aligned", "by_id", "schedule"),
        *_LOSS,
        *_PROMPTING,
        "training",
    )
    meaning: ClassVar[Mapping[str, str]] = {
        "base": "The base model's path, hub id or known name; no weight of it changes.",
        "data": "Prompts with responses; for `dpo` with `chosen` and `rejected`.",
        "output": "Folder of the adapter and its checkpoints: one run; started again, it goes on.",
        "schedule": "`trra`: λ of the fused teacher, or a schedule over the training step.",
        "divergence": "`trra`: `reverse`, `forward` or `jsd` (with `beta`), as in realign.",
        "beta": "`trra`: where `jsd` lies. (DPO's own β is `training.beta`.)",
        "gate": "`trra`: extrapolate only where base and aligned differ by more.",
        "chunk_size": "`trra`: tokens whose logits exist at one time.",
        "training": "Any field of trl.SFTConfig (of DPOConfig for `dpo`). By default "
        "`DEFAULT_ADAPT_TRAINING`.",
    }
    example: ClassVar[Mapping[str, Any]] = {"output": "out/fast", "schedule": 1.0}

    method: Literal["sft", "dpo", "trra"] = Field(
        "sft",
        description="`sft`: learn the responses; `dpo`: prefer the chosen ones; `trra`: towards "
        "`aligned` at `lambda`.",
    )
    adapter: str | None = Field(
        None, description="Folder of an adapter to go on from; null starts at the identity."
    )
    adapter_layers: int = Field(1, description="Layers of a new adapter.")
    strip_thinking: bool = Field(
        False,
        description="`sft`, `trra`: learn what follows the thinking alone, as the paper's fast mode does.",
        examples=[True],
    )
    aligned: str | None = Field(
        None,
        description="`trra`: the aligned model's path, hub id or known name, λ = 1.",
        examples=["miniature:aligned"],
    )
    by_id: ByID = False

    def _check_keys(self) -> None:
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
            if self.aligned is None or self.schedule is None:
                raise ConfigError("method trra needs `aligned` and `lambda`; add both lines.")
            return

        for key in ("aligned", "by_id", "lambda", *_LOSS):
            name = self.keys()[key]
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"{key} is for method trra; leave it out with method {self.method}, or set "
                    "`method: trra`."
                )

    def _full_training(self) -> dict[str, Any]:
        training = super()._full_training()
        if self.method == "dpo" and training.pop("precompute_ref_log_probs", True) is False:
            raise ConfigError(
                "training.precompute_ref_log_probs: false would load a second base; leave it out."
            )
        return training

    def _settings_class(self) -> Any:
        if self.method == "trra":
            return super()._settings_class()
        import trl

        return trl.DPOConfig if self.method == "dpo" else trl.SFTConfig

    def _own_arguments(self) -> dict[str, Any]:
        if self.method == "trra":
            return super()._own_arguments()
        return {"precompute_ref_log_probs": True} if self.method == "dpo" else {}


class BakeRecipe(_AdapterRecipe):
    """A plain model that behaves as base and adapter do at one λ: trained, or of a LoRA merged."""

    holds_out: ClassVar[bool] = True
    deciding: ClassVar[tuple[str, ...]] = ("lambda", "held_out", *_LOSS)
    order: ClassVar[tuple[str, ...]] = (
        *("base", "adapter", "schedule", "data", "columns", "output", "held_out"),
        *_LOSS,
        *_PROMPTING,
        "training",
    )
    meaning: ClassVar[Mapping[str, str]] = {
        "output": "Folder of the plain model: one run; started again, it goes on.",
        "gate": "As in equation 5.",
    }
    example: ClassVar[Mapping[str, Any]] = {"output": "out/baked"}

    adapter: str = Field(
        description="Folder of the adapter, which `flexalign adapt` made; or of a LoRA dial, which "
        "is merged: then `lambda` and `output` are all other keys.",
        examples=["out/fast"],
    )
    data: str = Field(
        "",
        description="Prompts with responses; a share of them is held out. None for a LoRA.",
        examples=["traces.jsonl"],
    )
    schedule: Annotated[Schedule, PlainValidator(_read_single_lambda)] = Field(
        alias="lambda", description="The setting of the dial, a number.", examples=[0.5]
    )
    held_out: Number = Field(
        0.05,
        description="Share of the rows, from 0 to 1, on which the divergence to the dial is measured.",
    )

    def _check_keys(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, got {self.held_out}.")

    def _own_arguments(self) -> dict[str, Any]:
        return super()._own_arguments() | {"eval_on_start": True}


# The keys as the command line's help and the docs show them.


@dataclass(frozen=True)
class RecipeKey:
    """One key of a section, as help texts and docs show it.

    Attributes:
        name: The key in the file.
        description: Its meaning.
        default: Its default value as YAML; None if the key is required.
        example: An example value.
        section: The keys inside it, if it is a section of its own.
    """

    name: str
    description: str
    default: str | None
    example: Any
    section: tuple["RecipeKey", ...] = ()


def describe_keys(section: type[Section]) -> Iterator[RecipeKey]:
    """Yield the keys of a recipe, or of a section, in the order of their declaration."""
    for name, field in section.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        inner = tuple(describe_keys(WatchSettings)) if name == "watch" else ()
        yield RecipeKey(
            name=field.alias or name,
            description=field.description or "",
            default=None if field.is_required() else as_yaml(default),
            example=field.examples[0] if field.examples else default,
            section=inner,
        )
