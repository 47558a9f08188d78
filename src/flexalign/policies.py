"""How the λ of a request is chosen.

A request's dial is a number, a schedule over its generated tokens, or a policy; one JSON form
serves Python, YAML, the command line and HTTP::

    0.5                                                  one λ throughout
    {"kind": "thinking", "think": 0.0, "answer": 1.0}    a schedule (flexalign.schedules)
    {"policy": "fixed", "lambda": 0.5}                   the same as the number
    {"policy": "adaptive", "threshold": 0.5}             fast where it is sure, else slow
    "auto"                                               adaptive, at the calibrated threshold
    {"policy": "route", "share": 0.3}                    a coin: this share goes the slow way
    "adaptive 0.5", "route 0.3"                          short forms, as text

Reading one needs no torch.
"""

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from flexalign._spelling import nearest
from flexalign.errors import ConfigError
from flexalign.schedules import Schedule, finite_lambda

if TYPE_CHECKING:
    import torch

__all__ = [
    "LAMBDA_LEGEND",
    "Adaptive",
    "Dial",
    "Fixed",
    "Measure",
    "Route",
    "Way",
    "extremes",
    "parse_dial",
]

Measure: TypeAlias = Literal["answer_probability", "min_token_probability", "agreement"]
"""How sure the fast answer is; see :class:`Adaptive`."""

Way: TypeAlias = Literal["fast", "slow"]

_DEFAULT_THRESHOLD = 0.5
"""The threshold where none is given and the adapter has not been calibrated."""

LAMBDA_LEGEND = "λ: 0 is the reference, 1 the aligned model or the adapter's"
"""What stands beside every table of λ."""


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
        _set(self, "lam", finite_lambda(self.lam, "lambda"))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` takes back."""
        return {"policy": "fixed", "lambda": self.lam}


@dataclass(frozen=True)
class Adaptive:
    """Think only where it pays: the fast answer if it is sure enough, else the slow one.

    Both streams are prefilled once. The fast one answers first, greedily. If its confidence
    reaches the threshold, that is the answer; else the slow stream goes on from its own prefilled
    cache, with the sampling that was asked for. A fast answer that the limit on new tokens cuts
    off is never accepted.

    Measures, all of the fast stream's own distribution at temperature 1:

    * ``"answer_probability"``: the product of its answer's token probabilities, the end included.
    * ``"min_token_probability"``: the smallest of them.
    * ``"agreement"``: the share of ``samples`` further answers, sampled, that equal the greedy one
      in the text after the thinking; white space and case do not count.

    Attributes:
        threshold: Least confidence that is accepted, in [0, 1]; 0 accepts every whole answer. None
            for the adapter's calibrated threshold, else 0.5.
        measure: The measure of confidence.
        fast_lambda: λ of the fast answer.
        slow_lambda: λ of the slow one.
        samples: Answers sampled for ``"agreement"``; no other measure asks.

    Raises:
        ConfigError: If a setting is unknown or out of its range.
        LambdaError: If a λ is not a finite number.
    """

    threshold: float | None = None
    measure: Measure = "answer_probability"
    fast_lambda: float = 1.0
    slow_lambda: float = 0.0
    samples: int = 5

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _set(self, "threshold", _share(self.threshold, "an adaptive policy's threshold"))
        if self.measure not in get_args(Measure):
            known = nearest(self.measure, get_args(Measure))
            raise ConfigError(f"{self.measure!r:.80} is no measure{known}")
        _set_lambdas(self)
        samples = self.samples
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ConfigError(
                f"an adaptive policy's samples must be a whole number ≥ 1, got {samples!r:.80}."
            )

    def resolved_threshold(self, calibrated: float | None = None) -> float:
        """Return the threshold that holds: its own, else the calibrated one, else 0.5."""
        if self.threshold is not None:
            return self.threshold
        return _DEFAULT_THRESHOLD if calibrated is None else calibrated

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` takes back."""
        return {"policy": "adaptive", **_changed(self)}


@dataclass(frozen=True)
class Route:
    """A coin between the ends: each request goes one way, whatever it asks.

    It is what an adaptive dial has to beat: its mean tokens and its mean accuracy lie on the
    straight line between the two ends.

    Attributes:
        share: Probability of the slow way, in [0, 1].
        fast_lambda: λ of the fast way.
        slow_lambda: λ of the slow way.

    Raises:
        ConfigError: If the share is not in [0, 1].
        LambdaError: If a λ is not a finite number.
    """

    share: float
    fast_lambda: float = 1.0
    slow_lambda: float = 0.0

    def __post_init__(self) -> None:
        _set(self, "share", _share(self.share, "a route policy's share (of the slow way)"))
        _set_lambdas(self)

    def draw(self, generator: "torch.Generator | None" = None) -> Way:
        """Draw one request's way, from torch's own random state or a generator."""
        import torch

        return "slow" if float(torch.rand((), generator=generator)) < self.share else "fast"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` takes back."""
        return {"policy": "route", **_changed(self)}


Dial: TypeAlias = Fixed | Schedule | Adaptive | Route
"""What a request's λ follows."""

_POLICIES: dict[str, tuple[type[Fixed | Adaptive | Route], dict[str, str]]] = {
    "fixed": (Fixed, {"lambda": "lam", "lam": "lam"}),
    "adaptive": (Adaptive, {field.name: field.name for field in fields(Adaptive)}),
    "route": (Route, {field.name: field.name for field in fields(Route)}),
}

_SHORT = {"adaptive": "threshold", "route": "share"}
"""Policies that have a short form, and what its number is."""


def parse_dial(value: object) -> Dial:
    """Read a dial from a number, a JSON object or text, a schedule or a policy.

    Example:
        >>> parse_dial({"policy": "fixed", "lambda": 0.5})
        Fixed(lam=0.5)
        >>> parse_dial({"policy": "route", "share": 0.3})
        Route(share=0.3, fast_lambda=1.0, slow_lambda=0.0)

    Raises:
        ConfigError: If it is malformed; names the key and the nearest known one.
        LambdaError: If a λ in it is not a finite number.
    """
    if isinstance(value, Dial):
        return value
    if isinstance(value, str):
        value = _from_text(value)
    if not isinstance(value, Mapping):
        return Fixed(value)  # type: ignore[arg-type]
    if not value.keys() & {"policy", "kind"}:
        raise ConfigError(
            'a dial\'s object has a "policy", as in {"policy": "adaptive", "threshold": 0.5}, or a '
            f'"kind", as in {{"kind": "thinking", "think": 0, "answer": 1}}; got {dict(value)!r:.80}.'
        )
    if "policy" not in value:
        return Schedule.parse(value)
    given = dict(value)
    name = given.pop("policy")
    if not isinstance(name, str) or name not in _POLICIES:
        raise ConfigError(f"{name!r:.80} is no policy{nearest(name, _POLICIES)}")
    policy, keys = _POLICIES[name]
    for key in given:
        if key not in keys:
            raise ConfigError(f"the policy {name} takes no {key!r:.80}{nearest(key, keys)}")
    if name == "fixed" and len(given) != 1:
        raise ConfigError('the policy fixed takes one λ: {"policy": "fixed", "lambda": 0.5}.')
    if name == "route" and "share" not in given:
        raise ConfigError('the policy route needs a share: {"policy": "route", "share": 0.3}.')
    return policy(**{keys[key]: argument for key, argument in given.items()})


def extremes(dial: Dial) -> tuple[float, float]:
    """Return the least and the largest λ that a dial may use.

    Example:
        >>> extremes(Adaptive(fast_lambda=1.5))
        (0.0, 1.5)
    """
    if isinstance(dial, Fixed):
        return dial.lam, dial.lam
    if isinstance(dial, Schedule):
        return min(dial.values), max(dial.values)
    ends = (dial.fast_lambda, dial.slow_lambda)
    return min(ends), max(ends)


def _from_text(text: str) -> object:
    words = ["adaptive"] if text.strip() == "auto" else text.split()
    if words and words[0] in _SHORT and len(words) <= 2:
        return {"policy": words[0], **_only_number(text, words)}
    try:
        value: object = json.loads(text)
    except ValueError as error:
        form = "write a number, adaptive 0.5, route 0.3, auto, or JSON"
        if not text.lstrip().startswith(("{", "[")):
            raise ConfigError(f"{text!r} is no λ and no policy; {form}.") from None
        raise ConfigError(f"{text!r} is no JSON ({error}); {form}.") from error
    return value


def _only_number(text: str, words: Sequence[str]) -> dict[str, float]:
    """Return the argument of a short form, ``adaptive 0.5``; nothing if there is none."""
    if len(words) == 1:
        return {}
    name, number = words
    try:
        return {_SHORT[name]: float(number)}
    except ValueError:
        form = json.dumps({"policy": name, _SHORT[name]: 0.5})
        raise ConfigError(
            f"the policy {text!r}: {number!r} is not a number; write {name} 0.5, or JSON such as "
            f"{form}."
        ) from None


def _changed(policy: Adaptive | Route) -> dict[str, Any]:
    """Return the fields that do not stand at their defaults."""
    return {
        field.name: getattr(policy, field.name)
        for field in fields(policy)
        if getattr(policy, field.name) != field.default
    }


def _set(policy: object, name: str, value: float) -> None:
    object.__setattr__(policy, name, value)


def _set_lambdas(policy: Adaptive | Route) -> None:
    for name in ("fast_lambda", "slow_lambda"):
        _set(policy, name, finite_lambda(getattr(policy, name), name))


def _share(value: object, name: str) -> float:
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
    if not 0 <= number <= 1:
        raise ConfigError(f"{name} must be a number in [0, 1], got {value!r:.80}.")
    return number
