"""The recipe of a realignment: one YAML file, typed, with overrides."""

import math
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from flexalign._spelling import nearest
from flexalign.errors import ConfigError, FlexAlignError
from flexalign.lambdas import Schedule

# YAML into typed settings: unknown keys and wrong types become one sentence.

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


class _MismatchError(Exception):
    """A value does not have the type that is wanted."""


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


def check_settings(
    values: object, wanted: Mapping[str, Any], where: str, required: Iterable[str] = ()
) -> dict[str, Any]:
    """Check the keys and the types of one mapping.

    Numbers that YAML 1.1 takes for text (``2e-5``, without a point) are read as numbers where a
    number is wanted, and whole numbers as floats where a float is wanted.

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
    required = tuple(required)
    checked = {}
    for key, value in values.items():
        if key not in wanted:
            raise ConfigError(f"unknown key {prefix + str(key)!r}{_suggest(key, wanted, prefix)}")
        if value is None and key in required:
            continue
        try:
            checked[key] = _convert(value, wanted[key])
        except _MismatchError:
            wish = _describe(wanted[key])
            raise ConfigError(f"{prefix}{key} must be {wish}, got {value!r}.") from None
    for key in required:
        if key not in checked:
            option = ", or give --lambda" if key == "lambda" else ""
            raise ConfigError(f"{prefix}{key} is missing; add a line `{key}: …`{option}.")
    return checked


_ELSEWHERE = {"reference": "realign", "base": "adapt or bake", "adapter": "bake", "method": "adapt"}
"""Keys of the file itself, and the commands whose recipes have them."""


def _suggest(key: object, wanted: Iterable[str], prefix: str) -> str:
    if not prefix and key in _ELSEWHERE:
        return f"; it belongs to a recipe of flexalign {_ELSEWHERE[str(key)]}."
    return nearest(key, wanted, prefix=prefix)


def _convert(value: Any, wanted: Any) -> Any:
    origin = get_origin(wanted)
    if wanted is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_to_any(value, get_args(wanted))
    if origin is Literal:
        return _require(value, value in get_args(wanted))
    plain = origin or wanted
    if plain is float:
        return _number(value)
    if plain is int:
        return _require(value, isinstance(value, int) and not isinstance(value, bool))
    if plain in (bool, str, dict, list):
        return _require(value, isinstance(value, plain))
    if plain is types.NoneType:
        return _require(value, value is None)
    # Enumerations and configuration objects: whoever defines them checks them.
    return value


def _convert_to_any(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in sorted(choices, key=lambda choice: choice is str):
        try:
            return _convert(value, choice)
        except _MismatchError:
            continue
    raise _MismatchError


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _MismatchError
    try:
        return float(value)
    except ValueError:
        raise _MismatchError from None


def _require(value: Any, holds: bool) -> Any:
    if not holds:
        raise _MismatchError
    return value


def _describe(wanted: Any) -> str:
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        parts = [_describe(part) for part in get_args(wanted) if part is not types.NoneType]
        return " or ".join(dict.fromkeys(parts))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(wanted))
    plain = origin or wanted
    return _NAMES.get(plain, getattr(plain, "__name__", str(plain)))


# What is measured while a student learns, as a recipe says it.


@dataclass(frozen=True)
class Watch:
    """What is measured while the student learns: its own answers to a few prompts.

    Attributes:
        prompts: File of prompts; rows with an ``answer`` give an accuracy too.
        every_steps: Steps between two measurements; the untrained student comes before step 0.
        limit: Prompts used, the first ones of the file.
        max_new_tokens: Where an answer is cut off; it then counts as truncated.
        temperature: Of sampling; 0 is greedy.
        batch_size: Prompts answered at one time.
    """

    prompts: str
    every_steps: int = 50
    limit: int = 32
    max_new_tokens: int = 512
    temperature: float = 1.0
    batch_size: int = 32


def parse_watch(values: object) -> Watch:
    """Check the ``watch`` section of a recipe.

    Raises:
        ConfigError: If a key is unknown, or a value has a wrong type or is out of its range.
    """
    watch = Watch(**check_settings(values, get_type_hints(Watch), "watch", ["prompts"]))
    for name in ("every_steps", "limit", "max_new_tokens", "batch_size"):
        if getattr(watch, name) < 1:
            raise ConfigError(f"watch.{name} must be at least 1, got {getattr(watch, name)}.")
    if not 0 <= watch.temperature < math.inf:
        raise ConfigError(
            f"watch.temperature must be a number ≥ 0 (0 is greedy), got {watch.temperature}."
        )
    return watch


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

        from flexalign.training.config import TrRaConfig

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
