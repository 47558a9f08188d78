"""Settings from YAML: a file and what is put over it, sections with known keys, and mistakes.

Every mistake becomes one sentence that names the key, what it takes, and the nearest known key.
"""

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from flexalign._spelling import nearest
from flexalign.errors import ConfigError

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


def as_yaml(value: Any) -> str:
    """Write a value on one line, as it stands behind a key."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    return text.removesuffix("...\n").strip()


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


def as_number(value: object) -> object:
    """YAML 1.1 takes a number without a point (``2e-5``) for text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Number: TypeAlias = Annotated[float, BeforeValidator(as_number)]
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
