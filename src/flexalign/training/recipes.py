"""Recipes: what a training run is told. One YAML file, one schema, and every key declared once.

A key's declaration below is all there is to say of it: its type, its default, and a description
that is also the help of the command line and the row in the docs. The keys of ``training`` and
``lora`` are those of TRL's and PEFT's own classes.

Nothing here loads torch before a recipe's own keys are found right.
"""

import copy
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from flexalign._spelling import nearest
from flexalign.errors import ConfigError, FlexAlignError
from flexalign.lambdas import Fixed, Schedule

# Reading: a YAML file that holds one mapping, and what the command line puts over it.


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: If the file is missing, is not YAML, or holds something else.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the recipe {path} is not there; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise ConfigError(f"{path} is not YAML{line}: {problem}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, such as `output: out/run`.")
    return tree


def split_assignment(text: str) -> tuple[str, Any]:
    """Read ``training.max_steps=100`` into a dotted key and a value, the value as YAML.

    Raises:
        ConfigError: If there is no ``=``, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write key=value, such as training.max_steps=100.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value {value!r} is not YAML.") from None


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings, which are made as needed.

    Raises:
        ConfigError: If the key leads through something that is not a mapping.
    """
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(
                f"{'.'.join(parents[: depth + 1])} is no mapping; {key} has no place."
            )
    tree[last] = value


def read_tree(
    path: str | Path, overrides: Iterable[str] = (), settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read a recipe's file, then put ``key=value`` texts and single keys over it.

    Args:
        path: The YAML file.
        overrides: Texts with dotted keys, the value as YAML.
        settings: Values of top-level keys that win over both; None is ignored.

    Raises:
        ConfigError: If the file, or a text, cannot be read.
    """
    tree = read_yaml(path)
    for override in overrides:
        key, value = split_assignment(override)
        set_value(tree, key, value)
    return tree | {key: value for key, value in (settings or {}).items() if value is not None}


def one_for_each_lambda(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make a recipe with a list of λ into one for each: outputs of their own, one cache.

    Args:
        tree: A recipe in the form of the YAML file; with one λ it is given back as it is.

    Raises:
        ConfigError: If the list is empty, or a λ is there twice or is no number.
    """
    lams = tree.get("lambda")
    if not isinstance(lams, list):
        return [dict(tree)]
    if any(isinstance(lam, bool) or not isinstance(lam, int | float) for lam in lams):
        raise ConfigError(f"lambda: a list of λ holds numbers, got {lams!r}.")
    names = [f"lambda={lam:g}" for lam in lams]
    if not lams or len(set(names)) < len(names):
        raise ConfigError(f"lambda: name each λ of a list once, and one at least, got {lams!r}.")

    output = str(tree.get("output", "")).rstrip("/")
    shared = {"cache_dir": tree.get("cache_dir") or f"{output}-cache"}
    return [
        {**tree, **shared, "lambda": lam, "output": f"{output}/{name}"}
        for lam, name in zip(lams, names, strict=True)
    ]


# Mistakes: whatever pydantic finds becomes one sentence that names the key and what it takes.

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}

_ELSEWHERE = {"reference": "realign", "base": "adapt or bake", "adapter": "bake", "method": "adapt"}
"""Keys of the file itself, and the commands whose recipes have them."""


def _unknown_key(key: object, known: Iterable[str], prefix: str) -> ConfigError:
    if not prefix and key in _ELSEWHERE:
        meant = f"; it belongs to a recipe of flexalign {_ELSEWHERE[str(key)]}."
    else:
        meant = nearest(key, known, prefix=prefix)
    return ConfigError(f"unknown key {prefix + str(key)!r}{meant}")


def _missing_key(key: str, prefix: str) -> ConfigError:
    option = ", or give --lambda" if key == "lambda" else ""
    return ConfigError(f"{prefix}{key} is missing; add a line `{key}: …`{option}.")


def _wrong_type(key: str, hint: Any, value: object) -> ConfigError:
    return ConfigError(f"{key} must be {_describe(hint)}, got {value!r}.")


def _describe(hint: Any) -> str:
    """Put a type into words, None left out."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _describe(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        parts = [_describe(part) for part in get_args(hint) if part is not types.NoneType]
        return " or ".join(dict.fromkeys(parts))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    plain = origin or hint
    if isinstance(plain, type) and issubclass(plain, BaseModel):
        return _NAMES[dict]
    return _NAMES.get(plain, getattr(plain, "__name__", str(plain)))


def _as_number(value: object) -> object:
    """YAML 1.1 takes a number without a point (``2e-5``) for text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Number: TypeAlias = Annotated[float, BeforeValidator(_as_number)]
"""A number as people write it in YAML; whole numbers become floats."""


def check_settings(
    values: object, wanted: Mapping[str, Any], where: str, required: Iterable[str] = ()
) -> dict[str, Any]:
    """Check the keys and the types of a mapping that belongs to a class of another library.

    Numbers that YAML 1.1 takes for text (``2e-5``, without a point) are read as numbers where a
    number is wanted, and whole numbers as floats where a float is wanted. Enumerations and
    configuration objects pass: the class that defines them checks them.

    Args:
        values: What the file holds.
        wanted: The permitted keys with their type annotations.
        where: What to call the mapping in messages: ``"training"``, or ``""`` for the whole file.
        required: Keys that must be there.

    Returns:
        The values, converted.

    Raises:
        ConfigError: For an unknown key (with the nearest known one), a missing key, or a value of
            another type.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the recipe'} must be a mapping, got {values!r}.")

    checked = {}
    for key, value in values.items():
        if key not in wanted:
            raise _unknown_key(key, wanted, prefix)
        hint = wanted[key]
        try:
            checked[key] = TypeAdapter(_from_yaml(hint)).validate_python(value, strict=True)
        except ValidationError:
            raise _wrong_type(prefix + key, hint, value) from None

    for key in required:
        if key not in checked:
            raise _missing_key(key, prefix)
    return checked


def _from_yaml(hint: Any) -> Any:
    """Return the type against which a value in YAML is checked, for a field of a data class."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        # Text takes what nothing else does: "2e-5" is a number where one may stand.
        choices = sorted(get_args(hint), key=lambda choice: choice is str)
        members = [_from_yaml(choice) for choice in choices if choice is not types.NoneType]
        joined = members[0]
        if len(members) > 1:
            union: Any = Union[tuple(members)]  # noqa: UP007
            joined = Annotated[union, Field(union_mode="left_to_right")]
        return joined if types.NoneType not in choices else joined | None
    plain = origin or hint
    if plain is float:
        return Number
    if plain in (bool, int, str, dict, list, types.NoneType):
        return plain
    return hint if origin is Literal else Any


class Section(BaseModel):
    """A mapping with known keys, whose mistakes are one sentence each. Never changes."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    section: ClassVar[str] = ""
    """Where it stands in the file; nowhere: it is the file."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._first_mistake(error) from None

    @classmethod
    def keys(cls) -> dict[str, str]:
        """Return the keys as YAML has them, each with the name of its field."""
        return {item.alias or name: name for name, item in cls.model_fields.items()}

    @classmethod
    def parse(cls, tree: Any) -> Self:
        """Check a mapping in the form of the YAML file.

        Raises:
            ConfigError: If a key is unknown (the nearest known one is named) or missing, a value
                is of another type or out of its range, or this version cannot do what is asked.
            LambdaError: If λ is not a finite number or a schedule.
        """
        prefix = cls._prefix()
        if not isinstance(tree, Mapping):
            raise ConfigError(f"{cls.section or 'the recipe'} must be a mapping, got {tree!r}.")
        keys = cls.keys()
        for key in tree:
            if key not in keys:
                raise _unknown_key(key, keys, prefix)
        # `output:` with nothing behind it is a key that is missing.
        given = {
            key: value
            for key, value in tree.items()
            if value is not None or not cls.model_fields[keys[key]].is_required()
        }
        return cls(**given)

    @classmethod
    def _prefix(cls) -> str:
        return f"{cls.section}." if cls.section else ""

    @classmethod
    def _first_mistake(cls, error: ValidationError) -> Exception:
        found = error.errors(include_url=False)
        order = {"extra_forbidden": 0, "missing": 2}
        first = min(found, key=lambda mistake: order.get(mistake["type"], 1))
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, Exception):  # one of ours, or a bug
            return cause

        key, prefix = str(first["loc"][0]), cls._prefix()
        if first["type"] == "extra_forbidden":
            return _unknown_key(key, cls.keys(), prefix)
        if first["type"] == "missing":
            return _missing_key(key, prefix)
        hint = cls.model_fields[cls.keys()[key]].annotation
        return _wrong_type(prefix + key, hint, first["input"])


class Watch(Section):
    """What is measured while the student learns: its own answers to a few prompts."""

    section: ClassVar[str] = "watch"

    prompts: str = Field(
        description="File of prompts; rows with an `answer` give an accuracy too.",
        examples=["questions.jsonl"],
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
        for name in ("every_steps", "limit", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"watch.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"watch.temperature must be a number ≥ 0 (0 is greedy), got {self.temperature}."
            )
        return self


def _read_watch(value: object) -> Watch | None:
    return value if value is None or isinstance(value, Watch) else Watch.parse(value)


def _read_mapping(value: object) -> object:
    """A section with nothing in it, ``training:``, is an empty one."""
    return {} if value is None else value


# λ: read here, once; from here on it is a schedule over the training step.


def _read_lambda(value: object) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Fixed):
        return Schedule("constant", start=value.lam)
    value = _as_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Mapping):
        raise ConfigError(f"lambda must be a number or a mapping, got {value!r}.")
    return Schedule.parse(value)


def _read_optional_lambda(value: object) -> Schedule | None:
    return None if value is None else _read_lambda(value)


def _read_single_lambda(value: object) -> Schedule:
    schedule = None if isinstance(value, Mapping | bool | list) else _read_lambda(value)
    if schedule is None or schedule.kind != "constant":
        raise ConfigError(f"lambda must be a number, got {value!r}.")
    return schedule


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

_WITHOUT_INFLUENCE = ("logging_", "save_", "report_to", "run_name", "disable_tqdm", "dataloader_")
"""How the fields begin that change what is shown or kept, not what is learned."""


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


def decisive(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a ``training`` section decides the trained weights.

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


# The three recipes, and what they share.


class Recipe(Section):
    """What every training run is told.

    Attributes:
        schedule: λ over the training step; None where a method needs none.
        training: Fields of the trainer's settings that the file gives.
    """

    default_training: ClassVar[dict[str, Any]] = DEFAULT_TRAINING
    deciding: ClassVar[tuple[str, ...]] = ()
    """Keys that decide the trained weights, beside the models, the data and `training`."""

    if TYPE_CHECKING:  # each recipe declares them, in its own order and words
        data: str
        output: str
        schedule: Schedule | None
        training: dict[str, Any]

    def __init__(self, **values: Any) -> None:
        super().__init__(**_by_key(values))

    @property
    def lam(self) -> Any:
        """λ in its JSON form: a number, a mapping, or None."""
        return None if self.schedule is None else self.schedule.to_json()

    @classmethod
    def load(cls, path: str | Path, *, overrides: Sequence[str] = (), **given: Any) -> Self:
        """Read a recipe.

        Args:
            path: The YAML file.
            overrides: ``key=value`` texts with dotted keys, the value as YAML.
            **given: Top-level values that win over both, by Python name; None is ignored.

        Raises:
            ConfigError: If the file cannot be read, and as `parse`.
            LambdaError: As `parse`.
        """
        return cls.parse(read_tree(path, overrides, _by_key(given)))

    @classmethod
    def of(cls, given: "str | Path | Mapping[str, Any] | Recipe") -> Self:
        """Return a recipe from a file's path, a mapping in the form of the file, or a recipe.

        Raises:
            ConfigError: As `load`, or if it is a recipe of another command.
            LambdaError: As `load`.
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
                tree[key] = _plain(value)
        return tree

    def to_yaml(self) -> str:
        """Return the recipe as YAML, defaults left out."""
        text: str = yaml.safe_dump(self.to_tree(), sort_keys=False, allow_unicode=True)
        return text

    def identity(self) -> dict[str, Any]:
        """Return everything in the recipe that decides the trained weights, for `run.json`."""
        keys = self.keys()
        own = {key: _plain(getattr(self, keys[key])) for key in self.deciding}
        return own | {"training": decisive(self._identifying_training())}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_keys()
        # Loading these takes seconds: what needs no trainer is refused by now.
        self.training.update(parse_training(self.training, self._settings_class()))
        self._check_sections()
        return self

    def _check_keys(self) -> None:
        """Refuse what cannot be, before the trainer's libraries load."""

    def _check_sections(self) -> None:
        """Refuse what only the trainer's libraries can tell."""
        self.arguments  # noqa: B018 - building them checks them

    def _full_training(self) -> dict[str, Any]:
        training = self.default_training | self.training
        if "num_train_epochs" in self.training and "max_steps" not in self.training:
            training["max_steps"] = -1
        return training

    def _identifying_training(self) -> dict[str, Any]:
        return self._full_training()

    def _settle(self, training: dict[str, Any], *, accelerated: bool) -> None:
        """Choose what the trainer's defaults leave open."""

    def _settings_class(self) -> Any:
        from flexalign.training.config import TrRaConfig

        return TrRaConfig

    def _own_arguments(self) -> dict[str, Any]:
        """Return the trainer's settings that are keys of the file itself."""
        return {"lam": self.schedule} | {
            name: getattr(self, name) for name in ("divergence", "beta", "gate", "chunk_size")
        }


def _by_key(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by Python name under the keys of the file."""
    return {("lambda" if name == "lam" else name): value for name, value in given.items()}


def _plain(value: Any) -> Any:
    """Return a value in the form of the YAML file."""
    if isinstance(value, Schedule):
        return value.to_json()
    return value.model_dump() if isinstance(value, Section) else value


_DIVERGENCE = Field(
    "reverse",
    description="`reverse`, KL(student‖teacher), the paper's; `forward`, or `jsd` (with `beta`).",
)
_BETA = Field(0.5, description="Where `jsd` lies: 0 is forward, 1 reverse.")
_GATE = Field(
    None,
    description="τ: go beyond [0, 1] only at tokens where the two models differ by more, such as "
    "0.01; null for the paper's form.",
)
_CHUNK_SIZE = Field(256, description="Tokens whose logits exist at one time.")
_LOSS = ("divergence", "beta", "gate", "chunk_size")


class RealignRecipe(Recipe):
    """A realignment: a student learns the fusion of a reference and an aligned model (TrRa)."""

    deciding: ClassVar[tuple[str, ...]] = (
        "lambda",
        *_LOSS,
        *("teacher", "rounds", "rollouts", "rollout_objective", "rollout_max_new_tokens", "lora"),
    )

    reference: str = Field(
        description="λ = 0, and where the student starts: a model's path or known name.",
        examples=["miniature:reference"],
    )
    aligned: str = Field(
        description="λ = 1: a model's path or known name, or a PEFT adapter on the reference.",
        examples=["miniature:aligned"],
    )
    data: str = Field(
        description="Traces, prompts with responses (flexalign sample): JSONL, JSON, Parquet or a "
        "saved data set.",
        examples=["traces.jsonl"],
    )
    output: str = Field(
        description="Folder of the model and its checkpoints: one run; started again, it goes on.",
        examples=["out/realigned"],
    )
    schedule: Annotated[Schedule, PlainValidator(_read_lambda)] = Field(
        alias="lambda",
        description="λ of the fused teacher (equation 5): a number, a list of numbers (a student "
        "for each), or a schedule over the step, {kind: linear, start: 0, end: 2, steps: 200}.",
        examples=[2.0],
    )
    divergence: str = _DIVERGENCE
    beta: Number = _BETA
    gate: Number | None = _GATE
    chunk_size: int = _CHUNK_SIZE
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
        description="What those minimise: `token`, the divergence to equation 5, or `sequence`, "
        "the reverse KL of whole responses.",
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
    watch: Annotated[Watch | None, PlainValidator(_read_watch)] = Field(
        None, description="The student answers prompts while it learns; null: it does not."
    )
    training: Annotated[dict[str, Any], BeforeValidator(_read_mapping)] = Field(
        default_factory=dict,
        description="Any field of trl.SFTConfig. By default `DEFAULT_TRAINING`.",
    )

    @classmethod
    def parse(cls, tree: Any) -> Self:
        """Check a mapping in the form of the YAML file, with one λ; raises as `load` does."""
        if isinstance(tree, Mapping) and isinstance(tree.get("lambda"), list):
            raise ConfigError(
                f"lambda: one λ in a run, got {len(tree['lambda'])}; read several with "
                "Recipe.load_each, as flexalign realign does."
            )
        return super().parse(tree)

    @classmethod
    def load_each(
        cls, path: str | Path, *, overrides: Sequence[str] = (), **given: Any
    ) -> list[Self]:
        """Read a recipe with one λ or a list of them: one recipe for each λ.

        With several, each writes to ``OUTPUT/lambda=0.5``, and all share one cache.

        Args:
            path: As in `load`, like the others.
            overrides: Likewise.
            **given: Likewise; `lam` may be a list.

        Raises:
            ConfigError: As `load`, or if a λ is there twice or is no number.
            LambdaError: As `load`.
        """
        tree = read_tree(path, overrides, _by_key(given))
        return [cls.parse(each) for each in one_for_each_lambda(tree)]

    @classmethod
    def each(cls, given: Any) -> list[Self]:
        """Return one recipe for each λ, of whatever `of` takes, or of a list of recipes."""
        if isinstance(given, list | tuple):
            return [cls.of(each) for each in given]
        if isinstance(given, Recipe):
            return [cls.of(given)]
        if isinstance(given, str | Path):
            return cls.load_each(given)
        if not isinstance(given, Mapping):
            return [cls.parse(given)]  # which says what is wrong with it
        return [cls.parse(each) for each in one_for_each_lambda(given)]

    @property
    def cache_folder(self) -> str:
        """Where the teachers' hidden states are, or would be."""
        return self.cache_dir or f"{self.output.rstrip('/')}-cache"

    def peft_config(self) -> Any:
        """Build the LoRA settings, or None where all weights are trained.

        PEFT fills in a configuration that it uses, so each use has its own.

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

    def _check_keys(self) -> None:
        if self.merge and self.lora is None:
            raise ConfigError("merge is for a LoRA student; add `lora:` or leave merge out.")

    def _check_sections(self) -> None:
        if self.lora is not None:
            from peft import LoraConfig

            check_settings(self.lora, get_type_hints(LoraConfig), "lora")
        super()._check_sections()
        self.peft_config()

    def _identifying_training(self) -> dict[str, Any]:
        # Runs that were begun before wrote max_steps: 200 here where epochs decide; they go on.
        return self.default_training | self.training

    def _own_arguments(self) -> dict[str, Any]:
        names = ("teacher", "rounds", "rollouts", "rollout_objective", "rollout_max_new_tokens")
        own = super()._own_arguments() | {name: getattr(self, name) for name in names}
        own["allow_pickle"] = self.allow_pickle
        return own | ({"cache_dir": self.cache_folder} if self.teacher == "cached" else {})


class _AdapterRecipe(Recipe):
    """What the recipes around a layer adapter share: its base, and how its trainers are set."""

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
    """The training of a layer adapter (InRa), in front of a base that stays as it is."""

    default_training: ClassVar[dict[str, Any]] = DEFAULT_ADAPT_TRAINING
    deciding: ClassVar[tuple[str, ...]] = (
        *("method", "adapter_layers", "strip_thinking", "lambda"),
        *_LOSS,
    )

    base: str = Field(
        description="The base model's path or known name; no weight of it changes.",
        examples=["miniature"],
    )
    data: str = Field(
        description="Prompts with responses; for `dpo` with `chosen` and `rejected`.",
        examples=["traces.jsonl"],
    )
    output: str = Field(
        description="Folder of the adapter and its checkpoints: one run; started again, it goes "
        "on.",
        examples=["out/fast"],
    )
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
        description="`trra`: the aligned model's path or known name, λ = 1.",
        examples=["miniature:aligned"],
    )
    schedule: Annotated[Schedule | None, PlainValidator(_read_optional_lambda)] = Field(
        None,
        alias="lambda",
        description="`trra`: λ of the fused teacher, or a schedule over the training step.",
        examples=[1.0],
    )
    divergence: str = Field(
        "reverse",
        description="`trra`: `reverse`, `forward` or `jsd` (with `beta`), as in realign.",
    )
    beta: Number = Field(
        0.5, description="`trra`: where `jsd` lies. (DPO's own β is `training.beta`.)"
    )
    gate: Number | None = Field(
        None, description="`trra`: extrapolate only where base and aligned differ by more."
    )
    chunk_size: int = Field(256, description="`trra`: tokens whose logits exist at one time.")
    training: Annotated[dict[str, Any], BeforeValidator(_read_mapping)] = Field(
        default_factory=dict,
        description="Any field of trl.SFTConfig (of DPOConfig for `dpo`). By default "
        "`DEFAULT_ADAPT_TRAINING`.",
    )

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
        for key in ("aligned", "lambda", *_LOSS):
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
    """The baking of a dial: one setting of base and adapter becomes a plain model."""

    deciding: ClassVar[tuple[str, ...]] = ("lambda", "held_out", *_LOSS)

    base: str = Field(description="The base model's path or known name.", examples=["miniature"])
    adapter: str = Field(
        description="Folder of the adapter, which `flexalign adapt` made.", examples=["out/fast"]
    )
    schedule: Annotated[Schedule, PlainValidator(_read_single_lambda)] = Field(
        alias="lambda", description="The setting of the dial, a number.", examples=[0.5]
    )
    data: str = Field(
        description="Prompts with responses; a share of them is held out.",
        examples=["traces.jsonl"],
    )
    output: str = Field(
        description="Folder of the plain model: one run; started again, it goes on.",
        examples=["out/baked"],
    )
    held_out: Number = Field(
        0.05,
        description="Share of the rows, from 0 to 1, on which the divergence to the dial is measured.",
    )
    divergence: str = _DIVERGENCE
    beta: Number = _BETA
    gate: Number | None = Field(None, description="As in equation 5.")
    chunk_size: int = _CHUNK_SIZE
    training: Annotated[dict[str, Any], BeforeValidator(_read_mapping)] = Field(
        default_factory=dict,
        description="Any field of trl.SFTConfig. By default `DEFAULT_TRAINING`.",
    )

    def _check_keys(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, got {self.held_out}.")

    def _own_arguments(self) -> dict[str, Any]:
        return super()._own_arguments() | {"eval_on_start": True}


# What the command line's help and the docs say of the keys.


@dataclass(frozen=True)
class Key:
    """One key of a section, for people.

    Attributes:
        name: As it stands in the file.
        description: What it means.
        default: Its value where the file has none, as YAML; None where it is required.
        example: A value to show.
        section: The keys inside it, where it is a section of ours.
    """

    name: str
    description: str
    default: str | None
    example: Any
    section: tuple["Key", ...] = ()


def as_yaml(value: Any) -> str:
    """Write a value on one line, as it stands behind a key."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def describe_keys(section: type[Section]) -> Iterator[Key]:
    """Go through the keys of a recipe, or of a section, in the order in which they are declared."""
    for name, field in section.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        inner = tuple(describe_keys(Watch)) if name == "watch" else ()
        yield Key(
            name=field.alias or name,
            description=field.description or "",
            default=None if field.is_required() else as_yaml(default),
            example=field.examples[0] if field.examples else default,
            section=inner,
        )
