"""How the λ of a request is chosen.

A request's dial is a number, a schedule over its generated tokens, or a policy; one JSON form
serves Python, YAML, the command line and HTTP::

    0.5                                                  one λ throughout
    {"kind": "thinking", "think": 0.0, "answer": 1.0}    a schedule (flexalign.schedules)
    {"policy": "fixed", "lambda": 0.5}                   the same as the number
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

from flexalign.errors import ConfigError
from flexalign.fusion import as_lambda
from flexalign.schedules import Schedule

__all__ = ["Dial", "Fixed", "parse_dial"]


@dataclass(frozen=True)
class Fixed:
    """One λ throughout.

    Attributes:
        lam: λ, any finite number.

    Raises:
        LambdaError: If it is not a finite number.
    """

    lam: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", float(as_lambda(self.lam)))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` takes back."""
        return {"policy": "fixed", "lambda": self.lam}


Dial: TypeAlias = Fixed | Schedule
"""What a row's λ follows."""

_POLICIES = {"fixed": (Fixed, {"lambda": "lam", "lam": "lam"})}


def parse_dial(value: object) -> Dial:
    """Read a dial from a number, a JSON object or text, a schedule or a policy.

    Example:
        >>> parse_dial({"policy": "fixed", "lambda": 0.5})
        Fixed(lam=0.5)

    Raises:
        ConfigError: If it is malformed; names the key and the nearest known one.
        LambdaError: If a λ in it is not a finite number.
    """
    if isinstance(value, Fixed | Schedule):
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(
                f"a dial must be a number or JSON, got {value!r} ({error})."
            ) from error
    if not isinstance(value, Mapping):
        return Fixed(value)  # type: ignore[arg-type]
    if "policy" not in value:
        return Schedule.parse(value)
    given = dict(value)
    name = given.pop("policy")
    if not isinstance(name, str) or name not in _POLICIES:
        raise ConfigError(f"{name!r} is no policy{_nearest(name, _POLICIES)}.")
    policy, keys = _POLICIES[name]
    for key in given:
        if key not in keys:
            raise ConfigError(f"the policy {name} takes no {key!r}{_nearest(key, keys)}.")
    if len(given) != 1:
        raise ConfigError(f'the policy {name} takes one λ: {{"policy": "{name}", "lambda": 0.5}}.')
    return policy(**{keys[key]: argument for key, argument in given.items()})


def _nearest(name: object, known: Mapping[str, object]) -> str:
    close = get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
