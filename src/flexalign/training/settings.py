"""Settings from YAML: reading a file and its overrides, and sections with known keys.

Every mistake is reported in one sentence that names the key, its type, and the nearest known key.
"""

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from flexalign._spelling import nearest
from flexalign.errors import ConfigError

# Reading: a YAML file that holds one mapping, and the overrides of the command line.


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for numbers to the base of 60: ``1:5`` is text here, and not 65."""

    def number(self, node: yaml.ScalarNode) -> Any:
        """Return a number, or the text if it has a colon."""
        if ":" in node.value:
            return node.value
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.number)


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: If the file is missing, is not YAML, or holds something else.
    """
    path = Path(path)
    try:
        tree = _load(path.read_text(encoding="utf-8"))
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
        return key.strip(), _load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value {value!r} is not YAML.") from None


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings, in place. Missing mappings are created.

    Raises:
        ConfigError: If a part of the key names a value that is not a mapping.
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
    """Read a recipe's file, then apply ``key=value`` texts and single values to it.

    Args:
        path: The YAML file.
        overrides: Texts with dotted keys, the value as YAML.
        settings: Values of top-level keys. They override both; None is ignored.

    Raises:
        ConfigError: If the file, or a text, cannot be read.
    """
    tree = read_yaml(path)
    for override in overrides:
        key, value = split_assignment(override)
        set_value(tree, key, value)
    return tree | {key: value for key, value in (settings or {}).items() if value is not None}


def as_yaml(value: Any) -> str:
    """Return a value as YAML on one line, as it is written after a key."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    return text.removesuffix("...\n").strip()


# Mistakes: pydantic's errors become one sentence that names the key and its type.

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}

_ELSEWHERE = {"reference": "realign", "base": "adapt or bake", "adapter": "bake", "method": "adapt"}
"""Top-level keys, and the commands whose recipes have them."""


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
    """Describe a type in words; None is left out."""
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
    """Convert text that is a number to float; return other values unchanged.

    YAML 1.1 reads a number without a point, such as ``2e-5``, as text.
    """
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Number: TypeAlias = Annotated[float, BeforeValidator(as_number)]
"""A number in YAML, also without a point (``2e-5``). Whole numbers become floats."""


def check_settings(
    values: object, wanted: Mapping[str, Any], where: str, required: Iterable[str] = ()
) -> dict[str, Any]:
    """Check the keys and the types of a mapping that belongs to a class of another library.

    For fields that take a number, numbers that YAML 1.1 reads as text (``2e-5``, without a point)
    are converted. For fields that take a float, whole numbers are converted. Enumerations and
    configuration objects are not checked here, but by the class that defines them.

    Args:
        values: The mapping in the file.
        wanted: The permitted keys with their type annotations.
        where: The mapping's name in messages: ``"training"``, or ``""`` for the whole file.
        required: Keys that must be present.

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
    """Return the type to check a YAML value against, for a data class field of type `hint`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        # Text comes last in a union, so that "2e-5" is a number if the field also takes numbers.
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
    """An immutable mapping with known keys, which reports each mistake in one sentence."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    section: ClassVar[str] = ""
    """The section's key in the file; empty if it is the whole file."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._first_mistake(error) from None

    @classmethod
    def keys(cls) -> dict[str, str]:
        """Return the keys in YAML, each with the name of its field."""
        return {item.alias or name: name for name, item in cls.model_fields.items()}

    @classmethod
    def parse(cls, tree: Any) -> Self:
        """Check a mapping in the form of the YAML file.

        Raises:
            ConfigError: If a key is unknown (the nearest known one is named) or missing, or a value
                is of another type, out of its range, or not supported.
            LambdaError: If λ is not a finite number or a schedule.
        """
        prefix = cls._prefix()
        if not isinstance(tree, Mapping):
            raise ConfigError(f"{cls.section or 'the recipe'} must be a mapping, got {tree!r}.")
        keys = cls.keys()
        for key in tree:
            if key not in keys:
                raise _unknown_key(key, keys, prefix)
        # A required key without a value, such as `output:`, counts as missing.
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
        kinds = {"extra_forbidden": 0, "missing": 2}
        places = {key: place for place, key in enumerate(cls.keys())}

        def rank(mistake: Any) -> tuple[int, int]:
            key = mistake["loc"][0] if mistake["loc"] else ""  # empty: about the whole section
            return kinds.get(mistake["type"], 1), places.get(key, 0)

        first = min(found, key=rank)
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, Exception):  # an error of this library, or a bug
            return cause

        key, prefix = str(first["loc"][0]), cls._prefix()
        if first["type"] == "extra_forbidden":
            return _unknown_key(key, cls.keys(), prefix)
        if first["type"] == "missing":
            return _missing_key(key, prefix)
        hint = cls.model_fields[cls.keys()[key]].annotation
        return _wrong_type(prefix + key, hint, first["input"])
