"""YAML into typed settings: unknown keys and wrong types become one sentence."""

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from flexalign._spelling import nearest
from flexalign.errors import ConfigError

__all__ = [
    "check_settings",
    "one_for_each_lambda",
    "read_tree",
    "read_yaml",
    "set_value",
    "split_assignment",
]

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
