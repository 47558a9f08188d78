"""λ: numbers, schedules and policies, their text and JSON forms, and permitted ranges.

A dial sets the λ of a run or of a request: one number (:class:`Fixed`), a :class:`Schedule` over
steps, or a policy that chooses for each request (:class:`Adaptive`, :class:`Exit`, :class:`Route`;
of weights between two models, :class:`Ladder`).
Python, YAML, the command line and HTTP use the same JSON form::

    2.0                                                          one λ throughout
    {"kind": "linear", "start": 0, "end": 2, "steps": 200}       straight from start to end
    {"kind": "cosine", "start": 0, "end": 2, "steps": 200}       the same, slow at both ends
    {"kind": "piecewise", "points": [[0, 0.5], [100, 2]]}        straight lines between points
    {"kind": "thinking", "think": 0.0, "answer": 1.0}            one λ inside the thinking, one after
    {"kind": "thinking", "think": 0.0, "answer": 1.0, "budget": 2000, "end": 1.5}
    {"policy": "fixed", "lambda": 0.5}                           the same as the number
    {"policy": "adaptive", "threshold": 0.5}                     fast if confident enough, else slow
    {"policy": "exit", "threshold": 0.95}                        slow, until a fast trial answer is confident
    {"policy": "route", "share": 0.3}                            slow with probability 0.3, else fast
    {"policy": "ladder", "thresholds": [0.9, 0.6], "lambdas": [1, 0.5, 0]}
                                                                 λ that falls with confidence
    "auto", "adaptive 0.5", "exit 0.95", "route 0.3", "ladder 0.9,0.6"
                                                                 short forms of policies, as text

    {"low": 0, "high": 5}, "0:5"                                 all λ of a range; in training only

A step is an optimizer step in training, and a generated token (counted from 0) in generation.
With a ``budget``, λ changes linearly from ``think`` to ``end`` over thinking tokens 0…``budget``
and remains at ``end`` until the thinking closes.

Entry points parse a dial (:func:`parse_dial`, :func:`parse_lambdas`) and check its range
(:func:`require_range`, :func:`require_forward`); all other code relies on the types.
This module does not import torch.
"""

import json
import math
import numbers
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, cast, get_args

from flexalign._spelling import nearest
from flexalign.errors import ConfigError, LambdaError

if TYPE_CHECKING:
    import torch

LAMBDA_LEGEND = "λ: 0 is the reference, 1 the aligned model or the adapter's"
"""The legend of every table of λ."""

# Numbers.

_LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest float32: λ is applied to logits in that precision."""


def finite_lambda(value: object, name: str) -> float:
    """Check a λ that is one number and return it.

    `flexalign.fusion.as_lambda` checks tensors, and has its own check of numbers: `fusion` imports
    only torch and the errors, and this module must load without torch.

    Args:
        value: λ.
        name: Its name in messages.

    Raises:
        LambdaError: If it is not a real number (a boolean is not one) or not finite in float32.
    """
    number = _real(value)
    if not abs(number) <= _LARGEST:
        raise LambdaError(f"{name} must be a finite number (a λ), got {value!r:.80}.")
    return number


def _real(value: object) -> float:
    """Return a number as a float, and NaN for anything else (including a boolean)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _set(owner: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass in its ``__post_init__``."""
    object.__setattr__(owner, name, value)


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
        _set(self, "lam", finite_lambda(self.lam, "lambda") + 0.0)  # −0 is 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` reads."""
        return {"policy": "fixed", "lambda": self.lam}


# Schedules: λ over optimizer steps, or over generated tokens.

JsonSchedule: TypeAlias = float | dict[str, Any]
"""The JSON form: a number, or an object with a ``kind``."""

_Value = TypeVar("_Value")

_REQUIRED = {
    "constant": ("start",),
    "linear": ("start", "end", "steps"),
    "cosine": ("start", "end", "steps"),
    "piecewise": ("points",),
    "thinking": ("think", "answer"),
}
_OPTIONAL = {"constant": ("end",), "thinking": ("budget", "end")}


@dataclass(frozen=True)
class Schedule:
    """λ over steps. Instances compare, hash and pickle by value.

    Attributes:
        kind: ``"constant"``, ``"linear"``, ``"cosine"``, ``"piecewise"`` or ``"thinking"``.
        start: λ at step 0.
        end: λ at and after the last step; for ``thinking``, λ at and after the budget.
        steps: Steps from ``start`` to ``end``.
        points: Pairs ``(step, λ)`` in ascending order of steps. Two points at one step are a jump.
        think: λ inside the thinking, at its first token.
        answer: λ outside the thinking.
        budget: Thinking tokens over which λ goes from ``think`` to ``end``.

    Raises:
        ConfigError: If a value is missing, malformed, or does not belong to the kind.
        LambdaError: If a λ is not a finite number.
    """

    kind: str
    start: float | None = None
    end: float | None = None
    steps: int | None = None
    points: tuple[tuple[float, float], ...] | None = None
    think: float | None = None
    answer: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        self._check_keys()
        for name in ("start", "end", "think", "answer"):
            value = getattr(self, name)
            if isinstance(value, Fixed):  # already checked
                _set(self, name, value.lam)
            elif value is not None:
                _set(self, name, finite_lambda(value, name))

        for name in ("steps", "budget"):
            if getattr(self, name) is not None:
                _set(self, name, _count(getattr(self, name), name))
        if self.points is not None:
            _set(self, "points", _points(self.points))

        if self.kind == "constant":
            if self.end not in (None, self.start):
                raise ConfigError(
                    f"a constant schedule has one λ, got start {self.start} and end {self.end}; "
                    "write the number alone, or kind linear."
                )
            _set(self, "end", self.start)

        if self.kind == "thinking" and (self.budget is None) != (self.end is None):
            raise ConfigError(
                "a thinking schedule takes 'budget' and 'end' together: λ goes from think to end "
                "over budget thinking tokens."
            )

    @classmethod
    def constant(cls, lam: Fixed) -> "Schedule":
        """Return the schedule with one λ throughout; it is not checked again."""
        return cls("constant", start=cast("float", lam))

    @classmethod
    def parse(cls, value: Union["Schedule", float, str, Mapping[str, Any]]) -> "Schedule":
        """Read a schedule from a number, its JSON form (an object or a text), or a schedule.

        Example:
            >>> Schedule.parse('{"kind": "linear", "start": 0, "end": 2, "steps": 200}').at(50)
            0.5

        Raises:
            ConfigError: If it is malformed; the message names the key and the nearest known one.
            LambdaError: If a λ in it is not a finite number.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ConfigError(
                    f"a schedule must be a number or a JSON object, got {value!r:.80} ({error})."
                ) from error

        if not isinstance(value, Mapping):
            return cls.constant(Fixed(cast("float", value)))

        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                raise ConfigError(f"a schedule has no key {key!r:.80}{nearest(key, known)}")
        if "kind" not in value:
            raise ConfigError(f"a schedule needs a 'kind': one of {', '.join(_REQUIRED)}.")

        given = dict(value)
        if given["kind"] == "constant":
            given.setdefault("start", given.get("end"))
        return cls(**given)

    def at(self, step: float, *, inside: bool = False, thinking_tokens: int = 0) -> float:
        """Return λ at a step.

        Args:
            step: Number of optimizer steps done, or index of the generated token (the first is 0).
            inside: Whether that token is inside the thinking; only used by ``thinking``.
            thinking_tokens: Index of that token among the row's thinking tokens; only used by
                ``thinking``.
        """
        if self.kind == "thinking":
            if not inside:
                return _known(self.answer)
            if self.budget is None:
                return _known(self.think)
            return _between(_known(self.think), _known(self.end), thinking_tokens / self.budget)

        if self.kind == "piecewise":
            return _along(_known(self.points), step)
        if self.kind == "constant":
            return _known(self.start)

        share = min(max(step / _known(self.steps), 0.0), 1.0)
        if self.kind == "cosine":
            share = 0.5 * (1 - math.cos(math.pi * share))
        return _between(_known(self.start), _known(self.end), share)

    @property
    def end_value(self) -> float:
        """λ at the end of the schedule; for a thinking schedule, λ of the answer."""
        if self.kind == "thinking":
            return _known(self.answer)
        return _known(self.points)[-1][1] if self.kind == "piecewise" else _known(self.end)

    @property
    def follows_thinking(self) -> bool:
        """Whether :meth:`at` needs ``inside`` and ``thinking_tokens``; training never has them."""
        return self.kind == "thinking"

    @property
    def values(self) -> tuple[float, ...]:
        """The λ's that define it; :meth:`at` returns none below the least or above the largest."""
        numbers_ = (self.start, self.end, self.think, self.answer)
        points = self.points or ()
        return tuple(v for v in numbers_ if v is not None) + tuple(v for _, v in points)

    def to_json(self) -> JsonSchedule:
        """Return the JSON form, which ``parse`` reads: a number if constant, else an object."""
        if self.kind == "constant":
            return _known(self.start)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        result = {name: value for name, value in given.items() if value is not None}
        if self.points is not None:
            result["points"] = [list(point) for point in self.points]
        return result

    def _check_keys(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _REQUIRED:
            raise ConfigError(
                f"kind {self.kind!r:.80} is no schedule{nearest(self.kind, _REQUIRED)}"
            )

        required = _REQUIRED[self.kind]
        allowed = required + _OPTIONAL.get(self.kind, ())

        for field in fields(self)[1:]:
            given = getattr(self, field.name) is not None
            if given and field.name not in allowed:
                raise ConfigError(
                    f"a {self.kind} schedule takes no {field.name!r}; it takes "
                    f"{', '.join(allowed)}."
                )
            if not given and field.name in required:
                raise ConfigError(
                    f"a {self.kind} schedule needs {field.name!r}; it takes {', '.join(allowed)}."
                )


def _known(value: _Value | None) -> _Value:
    """Return a value that ``__post_init__`` has checked, without None in its type."""
    return cast("_Value", value)


def _between(start: float, end: float, share: float) -> float:
    """Interpolate from start to end: exact at both, with the share limited to [0, 1]."""
    share = min(max(share, 0.0), 1.0)
    return end if share == 1.0 else start + (end - start) * share


def _along(points: tuple[tuple[float, float], ...], step: float) -> float:
    after = bisect_right(points, step, key=lambda point: point[0])
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (left, start), (right, end) = points[after - 1], points[after]
    return _between(start, end, (step - left) / (right - left))


def _count(value: object, name: str) -> int:
    number = _real(value)
    if not (number >= 1 and number.is_integer()):
        raise ConfigError(f"{name} must be a whole number ≥ 1, got {value!r:.80}.")
    return int(number)


def _points(value: object) -> tuple[tuple[float, float], ...]:
    hint = "points must be pairs [step, λ] in order of their steps, such as [[0, 0.5], [100, 2]]"
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{hint}; got {value!r:.80}.")

    points: list[tuple[float, float]] = []
    for point in value:
        if not isinstance(point, list | tuple) or len(point) != 2:
            raise ConfigError(f"{hint}; got {point!r:.80} among them.")

        step = _real(point[0])
        if not 0 <= step < math.inf:
            raise ConfigError(f"{hint}; the step {point[0]!r:.80} is not a number ≥ 0.")
        if points and step < points[-1][0]:
            raise ConfigError(f"{hint}; step {step:g} comes after {points[-1][0]:g}.")

        points.append((step, finite_lambda(point[1], f"points at step {step:g}")))
    return tuple(points)


# Ranges: every λ between two ends, in one training.


@dataclass(frozen=True)
class LambdaRange:
    """All λ from `low` to `high`. One training of a LoRA dial covers them.

    It is no dial: a request is answered at one λ of the range.

    Attributes:
        low: The least λ.
        high: The largest λ.

    Raises:
        LambdaError: If an end is not a finite number, or `low` is not below `high`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            _set(self, name, finite_lambda(getattr(self, name), name) + 0.0)  # −0 is 0
        if not self.low < self.high:
            raise LambdaError(
                f"a range of λ goes from low to a larger high, got low {self.low:g} and high "
                f"{self.high:g}; for one λ write the number alone."
            )

    @classmethod
    def parse(cls, value: Union["LambdaRange", str, Mapping[str, Any]]) -> "LambdaRange":
        """Read a range from its JSON form, its text form, or a range.

        Example:
            >>> LambdaRange.parse("-1:2")
            LambdaRange(low=-1.0, high=2.0)

        Raises:
            ConfigError: If a key is unknown or missing.
            LambdaError: As in the class, or if the text is not two numbers.
        """
        if isinstance(value, LambdaRange):
            return value
        if isinstance(value, str):
            parts = value.split(":")
            try:
                low, high = map(float, parts)
            except ValueError:
                raise LambdaError(
                    f"{value!r:.80} is no range of λ; write LOW:HIGH, such as 0:5."
                ) from None
            return cls(low, high)

        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                raise ConfigError(f"a range of λ has no key {key!r:.80}{nearest(key, known)}")
        for key in known:
            if key not in value:
                raise ConfigError(f"a range of λ needs {key!r}, as in {{low: 0, high: 5}}.")
        return cls(**value)

    def at(self, share: float) -> float:
        """Return the λ at a share of the way from `low` (0) to `high` (1)."""
        return _between(self.low, self.high, share)

    def clamp(self, lam: float) -> float:
        """Return a λ, or the end that is nearest to it if it lies outside."""
        return min(max(lam, self.low), self.high)

    @property
    def marks(self) -> tuple[float, ...]:
        """A few λ that show the range, ascending: its ends, its middle, and 0 and 1 if inside."""
        inside = [lam for lam in (0.0, 1.0) if self.low <= lam <= self.high]
        return tuple(sorted({self.low, self.at(0.5), self.high, *inside}))

    @property
    def end_value(self) -> float:
        """The λ farthest from the pair, which the caution of large λ goes by: `high`."""
        return self.high

    @property
    def values(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def to_json(self) -> dict[str, float]:
        """Return the JSON form, which ``parse`` reads."""
        return {"low": self.low, "high": self.high}

    def __str__(self) -> str:
        """Return the text form, which ``parse`` reads: ``0:5``."""
        return f"{self.low:g}:{self.high:g}"


TrainingLambda: TypeAlias = Schedule | LambdaRange
"""The λ of a training: a number or a schedule over the step, or a range for a LoRA dial."""


def parse_training_lambda(value: object) -> TrainingLambda:
    """Read the λ of a training: a number, a schedule over the step, or a range, in any form.

    Example:
        >>> parse_training_lambda({"low": 0, "high": 5})
        LambdaRange(low=0.0, high=5.0)

    Raises:
        ConfigError: If it is malformed; the message names the key and the nearest known one.
        LambdaError: If a λ in it is not a finite number, or the ends of a range are not in order.
    """
    if isinstance(value, Schedule | LambdaRange):
        return value
    if isinstance(value, Fixed):
        return Schedule.constant(value)
    if isinstance(value, str):
        if ":" in value and not value.lstrip().startswith("{"):
            return LambdaRange.parse(value)
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, Mapping) and not value.keys().isdisjoint({"low", "high"}):
        return LambdaRange.parse(value)
    return Schedule.parse(cast("float", value))


# Policies: whether a whole request is answered fast or slow.

Measure: TypeAlias = Literal["answer_probability", "min_token_probability", "agreement"]
"""A measure of the fast answer's confidence; see :class:`Adaptive`."""

Way: TypeAlias = Literal["fast", "slow"]
"""The two ends of a dial between which a policy chooses."""

_DEFAULT_THRESHOLD = 0.5
"""The threshold if none is given and the adapter is not calibrated."""


@dataclass(frozen=True)
class Adaptive:
    """Return the fast answer if its confidence reaches a threshold, else the slow one.

    Both streams are prefilled once. The fast stream answers first, greedily. If its confidence
    reaches the threshold, that is the answer; else the slow stream continues from its own prefilled
    cache, with the requested sampling. A fast answer that is cut off by the limit on new tokens is
    never accepted.

    All measures use the fast stream's own distribution at temperature 1:

    * ``"answer_probability"``: the product of the answer's token probabilities, including the end.
    * ``"min_token_probability"``: the smallest of them.
    * ``"agreement"``: the share of ``samples`` further, sampled answers that equal the greedy one
      in the text after the thinking; white space and case are ignored.

    Attributes:
        threshold: Least accepted confidence, in [0, 1]; 0 accepts every complete answer. If None,
            the adapter's calibrated threshold, or 0.5 without one.
        measure: The measure of confidence.
        fast_lambda: λ of the fast answer.
        slow_lambda: λ of the slow answer.
        samples: Number of answers sampled for ``"agreement"``; other measures ignore it.

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

        _check_measure(self, "an adaptive policy's samples")
        _set_lambdas(self)

    def resolved_threshold(self, calibrated: float | None = None) -> float:
        """Return the threshold to apply: its own, else the calibrated one, else 0.5."""
        if self.threshold is not None:
            return self.threshold
        return _DEFAULT_THRESHOLD if calibrated is None else calibrated

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` reads."""
        return {"policy": "adaptive", **_changed(self)}


@dataclass(frozen=True)
class Exit:
    """Think slowly, and close the thinking as soon as a fast trial answer is confident enough.

    The slow stream thinks, with the requested sampling. At each end of a part of its thinking, the
    thinking is closed on trial, as the model's chat template closes it, and the fast stream answers
    greedily: it writes what it would write after the prompt, the thinking so far and the closing
    tag. If the answer ends within ``answer_tokens`` and its confidence reaches the threshold, the
    thinking is closed there, and the trial answer is the answer. Else the slow stream continues
    from before the trial. Where the thinking closes without an exit, and in a response without
    thinking, the slow stream answers.

    The measures are those of :class:`Adaptive`. On a model with one stream both λ have no effect.
    Source: dynamic early exit (arXiv 2504.15895), here with the answer of the fast stream.

    Attributes:
        threshold: Least accepted confidence, in [0, 1]; 0 accepts the first complete trial answer.
            It is never the calibrated one, which belongs to answers without thinking.
        measure: The measure of confidence.
        marker: The text that ends a part of the thinking; an empty line by default. There is no
            trial at a part of white space only, or where the marker ends inside a token.
        answer_tokens: Tokens after which a trial answer is cut off, and rejected.
        fast_lambda: λ of the trial answers.
        slow_lambda: λ of the thinking, and of an answer without an exit.
        samples: Number of answers sampled for ``"agreement"``; other measures ignore it.

    Raises:
        ConfigError: If a setting is unknown or out of its range.
        LambdaError: If a λ is not a finite number; a schedule is not available.
    """

    threshold: float = 0.95
    measure: Measure = "answer_probability"
    marker: str = "\n\n"
    answer_tokens: int = 64
    fast_lambda: float = 1.0
    slow_lambda: float = 0.0
    samples: int = 5

    def __post_init__(self) -> None:
        _set(self, "threshold", _share(self.threshold, "an exit policy's threshold"))
        _check_measure(self, "an exit policy's samples")
        _set_lambdas(self)

        if not isinstance(self.marker, str) or not self.marker:
            raise ConfigError(
                f"an exit policy's marker must be a text that is not empty, got {self.marker!r:.80}."
            )
        _require_count(self.answer_tokens, "an exit policy's answer_tokens")

    @property
    def lambdas(self) -> Schedule:
        """λ inside the thinking and after it, as far as an exit ends it."""
        return Schedule("thinking", think=self.slow_lambda, answer=self.fast_lambda)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` reads."""
        return {"policy": "exit", **_changed(self)}


@dataclass(frozen=True)
class Route:
    """Answer each request fast or slow at random, independently of its content.

    It is the baseline of an adaptive dial: its mean tokens and its mean accuracy are on the
    straight line between the two ends.

    Attributes:
        share: Probability of a slow answer, in [0, 1].
        fast_lambda: λ of a fast answer.
        slow_lambda: λ of a slow answer.

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
        """Draw fast or slow for one request, from the generator or torch's random state."""
        import torch

        return "slow" if float(torch.rand((), generator=generator)) < self.share else "fast"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_dial` reads."""
        return {"policy": "route", **_changed(self)}


Policy: TypeAlias = Adaptive | Exit | Route
"""A policy that chooses, for a whole response, which stream answers."""


@dataclass(frozen=True)
class Ladder:
    """Give each question a λ that falls with the confidence of a first answer.

    It is for weights between two models, which are one model for each λ. The model of the first λ
    answers first, greedily. From the largest threshold on, that is the answer. Below it, the answer is
    rejected, and the question is answered at another λ with the requested sampling: at the second one
    down to the second threshold, and so on; at the last one below all thresholds. A first answer that
    is cut off by the limit on new tokens is rejected for the last λ.

    The measures are those of :class:`Adaptive`. With one threshold it is that policy, in the weights.
    Source: dynamic model interpolation (arXiv 2601.21414), which sets λ for each question without
    training by a discrepancy of both models' confidence; here λ has steps, and one model is asked.

    Attributes:
        thresholds: The least confidence of each λ but the last, in [0, 1], descending.
        lambdas: The λ, one more than the thresholds; if empty, from 1 to 0 in equal steps.
        measure: The measure of confidence.
        samples: Number of answers sampled for ``"agreement"``; other measures ignore it.

    Raises:
        ConfigError: If a setting is unknown or out of its range, or the numbers do not fit together.
        LambdaError: If a λ is not a finite number.
    """

    thresholds: tuple[float, ...]
    lambdas: tuple[float, ...] = ()
    measure: Measure = "answer_probability"
    samples: int = 5

    def __post_init__(self) -> None:
        whose = "a ladder's thresholds"
        if not isinstance(self.thresholds, list | tuple) or not self.thresholds:
            raise ConfigError(
                f"{whose} must be numbers in [0, 1], such as [0.9, 0.6], got {self.thresholds!r:.80}."
            )
        thresholds = tuple(_share(one, f"each of {whose}") for one in self.thresholds)
        if any(low >= high for high, low in pairwise(thresholds)):
            raise ConfigError(f"{whose} must descend, got {_word(thresholds)}.")
        _set(self, "thresholds", thresholds)

        if not isinstance(self.lambdas, list | tuple):
            raise ConfigError(f"a ladder's lambdas must be a list, got {self.lambdas!r:.80}.")
        lambdas = tuple(finite_lambda(one, "each of a ladder's lambdas") for one in self.lambdas)
        lambdas = lambdas or _equal_steps(len(thresholds))
        if len(lambdas) != len(thresholds) + 1 or len(set(lambdas)) < len(lambdas):
            raise ConfigError(
                f"a ladder's lambdas must be {len(thresholds) + 1} different ones, one more than its "
                f"thresholds, got {_word(lambdas)}."
            )
        _set(self, "lambdas", lambdas)
        _check_measure(self, "a ladder's samples")

    @property
    def first(self) -> Adaptive:
        """The policy of first answers: one below all thresholds is not written to its end."""
        return Adaptive(self.thresholds[-1], self.measure, self.lambdas[0], samples=self.samples)

    def next_lambda(self, confidence: float | None) -> float | None:
        """Return the λ to answer at after a first answer; None if that is kept.

        Example:
            >>> Ladder((0.9, 0.6)).next_lambda(0.7)
            0.5

        Args:
            confidence: The first answer's confidence; None if it did not come to its end.
        """
        if confidence is None:
            return self.lambdas[-1]
        passed = sum(confidence < threshold for threshold in self.thresholds)
        return self.lambdas[passed] if passed else None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which :func:`parse_any_dial` reads."""
        form = {"policy": "ladder", **_changed(self)}
        if self.lambdas == _equal_steps(len(self.thresholds)):
            del form["lambdas"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in form.items()}


def _equal_steps(steps: int) -> tuple[float, ...]:
    """Return λ from 1 to 0 in equal steps, exact at both ends."""
    return tuple(1 - step / steps for step in range(steps + 1))


def ladder_refused(ladder: Ladder) -> str:
    """Return why a ladder is refused where there is one model, and what serves it."""
    return (
        f"{dial_name(ladder)} gives each question weights of its own, which interpolate:REF,ALIGNED "
        "alone has; measure that system with flexalign evaluate or tune. A dial takes an adaptive policy."
    )


def way_dial(policy: Policy, way: Way) -> Fixed:
    """Return the dial of a policy's fast or slow answers.

    Example:
        >>> way_dial(Route(share=0.3), "fast")
        Fixed(lam=1.0)
    """
    return Fixed(policy.fast_lambda if way == "fast" else policy.slow_lambda)


def thinking_lambda(dial: "AnyDial | None") -> float | None:
    """Return the λ that a response begins at, and thinks at; None if it is no one number.

    Example:
        >>> thinking_lambda(Exit(slow_lambda=0.2))
        0.2
    """
    if isinstance(dial, Exit):
        return dial.slow_lambda
    return dial.lam if isinstance(dial, Fixed) else None


def _set_lambdas(policy: Policy) -> None:
    for name in ("fast_lambda", "slow_lambda"):
        _set(policy, name, finite_lambda(getattr(policy, name), name))


def _check_measure(policy: Adaptive | Exit | Ladder, samples: str) -> None:
    """Check a policy's measure and its samples, which have this name in the message."""
    if policy.measure not in get_args(Measure):
        known = nearest(policy.measure, get_args(Measure))
        raise ConfigError(f"{policy.measure!r:.80} is no measure{known}")
    _require_count(policy.samples, samples)


def _require_count(value: object, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number ≥ 1, got {value!r:.80}.")


def _share(value: object, name: str) -> float:
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
    if not 0 <= number <= 1:
        raise ConfigError(f"{name} must be a number in [0, 1], got {value!r:.80}.")
    return number


def _changed(policy: Policy | Ladder) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    return {
        field.name: getattr(policy, field.name)
        for field in fields(policy)
        if getattr(policy, field.name) != field.default
    }


# Parsing: from user input to a dial.

Dial: TypeAlias = Fixed | Schedule | Adaptive | Exit | Route
"""The type of all dials of one model in memory."""

AnyDial: TypeAlias = Dial | Ladder
"""The type of all dials."""

_POLICIES: dict[str, tuple[type[Fixed | Adaptive | Exit | Route | Ladder], dict[str, str]]] = {
    "fixed": (Fixed, {"lambda": "lam", "lam": "lam"}),
    "adaptive": (Adaptive, {field.name: field.name for field in fields(Adaptive)}),
    "exit": (Exit, {field.name: field.name for field in fields(Exit)}),
    "route": (Route, {field.name: field.name for field in fields(Route)}),
    "ladder": (Ladder, {field.name: field.name for field in fields(Ladder)}),
}

_SHORT = {
    "adaptive": "threshold",
    "exit": "threshold",
    "route": "share",
    "ladder": "thresholds",
}
"""Policies that have a short form, and the field that its number, or numbers, set."""


def parse_dial(value: object) -> Dial:
    """Read the dial of one model from a number, a JSON object or text, a schedule or a policy.

    Example:
        >>> parse_dial({"policy": "fixed", "lambda": 0.5})
        Fixed(lam=0.5)
        >>> parse_dial({"policy": "route", "share": 0.3})
        Route(share=0.3, fast_lambda=1.0, slow_lambda=0.0)

    Raises:
        ConfigError: If it is malformed, where the message names the key and the nearest known one; or
            if it is a :class:`Ladder`.
        LambdaError: If a λ in it is not a finite number.
    """
    dial = parse_any_dial(value)
    if isinstance(dial, Ladder):
        raise ConfigError(ladder_refused(dial))
    return dial


def parse_any_dial(value: object) -> AnyDial:
    """Read a dial of any kind, as :func:`parse_dial` does, ladders included.

    Example:
        >>> parse_any_dial("ladder 0.9,0.6")
        Ladder(thresholds=(0.9, 0.6), lambdas=(1.0, 0.5, 0.0), measure='answer_probability', samples=5)

    Raises:
        ConfigError: If it is malformed; the message names the key and the nearest known one.
        LambdaError: If a λ in it is not a finite number.
    """
    if isinstance(value, AnyDial):
        return value
    if isinstance(value, str):
        value = _from_text(value)
    if not isinstance(value, Mapping):
        return Fixed(value)  # type: ignore[arg-type]  # Fixed checks that it is a number

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
    if name == "ladder" and "thresholds" not in given:
        raise ConfigError(
            'the policy ladder needs thresholds: {"policy": "ladder", "thresholds": [0.9, 0.6]}.'
        )

    return policy(**{keys[key]: argument for key, argument in given.items()})


def _from_text(text: str) -> object:
    words = ["adaptive"] if text.strip() == "auto" else text.split()
    if words and words[0] in _SHORT and len(words) <= 2:
        return {"policy": words[0], **_only_argument(text, words)}

    try:
        value: object = json.loads(text)
    except ValueError as error:
        form = "write a number, adaptive 0.5, exit 0.95, route 0.3, ladder 0.9,0.6, auto, or JSON"
        if not text.lstrip().startswith(("{", "[")):
            raise ConfigError(f"{text!r} is no λ and no policy; {form}.") from None
        raise ConfigError(f"{text!r} is no JSON ({error}); {form}.") from error
    return value


def _only_argument(text: str, words: Sequence[str]) -> dict[str, float | list[float]]:
    """Return the argument of a short form such as ``adaptive 0.5``; empty if there is none."""
    if len(words) == 1:
        return {}
    name, argument = words
    try:
        if name == "ladder":
            return {_SHORT[name]: [float(number) for number in argument.split(",")]}
        return {_SHORT[name]: float(argument)}
    except ValueError:
        what, example = "a number", "0.5"
        if name == "ladder":
            what, example = "numbers with commas between", "0.9,0.6"
        value = [0.9, 0.6] if name == "ladder" else 0.5
        form = json.dumps({"policy": name, _SHORT[name]: value})
        raise ConfigError(
            f"the policy {text!r}: {argument!r} is not {what}; write {name} {example}, or JSON such "
            f"as {form}."
        ) from None


def parse_lambdas(text: str) -> list[Fixed]:
    """Read ``--lambda 0,0.5,1``: one λ, or several separated by commas.

    Raises:
        LambdaError: If a part is not a finite number.
    """
    dials = []
    for part in text.split(","):
        try:
            dials.append(Fixed(float(part)))
        except ValueError:  # LambdaError is a ValueError too
            raise LambdaError(
                f"--lambda: {part.strip()!r} is not a finite number; "
                "write one number or several with commas, such as 0,0.5,1."
            ) from None
    return dials


# Settings: dials with the ids that results use.


@dataclass(frozen=True)
class Setting:
    """A dial with the id under which measurements and answers are stored.

    Attributes:
        id: Its name in results: ``λ=0.5``, ``adaptive 0.5``, ``route 0.3``, ``ladder 0.9,0.6``, a
            schedule's JSON, or ``as it is`` for a system without a dial. The same dial always has
            the same id.
        dial: The dial; None for a system without one.
        effort: The effort that was requested; None if the dial itself was requested.
    """

    id: str
    dial: AnyDial | None = None
    effort: float | None = None

    @classmethod
    def of(cls, value: object, effort: float | None = None) -> "Setting":
        """Make a setting from a dial in any of its forms.

        Raises:
            ConfigError: If it is malformed.
            LambdaError: If a λ in it is not a finite number.
        """
        dial = parse_any_dial(value)
        return cls(dial_name(dial), dial, effort)

    @property
    def label(self) -> str:
        """Its name in tables: its id, after the effort if there is one."""
        return setting_label(self.id, self.effort)

    @property
    def lam(self) -> float | None:
        """λ, if the dial is one number; else None."""
        return self.dial.lam if isinstance(self.dial, Fixed) else None

    @property
    def policy(self) -> dict[str, Any] | None:
        """The JSON form of a schedule, or of a policy with more than one λ; else None."""
        if self.dial is None or isinstance(self.dial, Fixed):
            return None
        form: Any = self.dial.to_json()
        return dict(form)


AS_IT_IS = Setting("as it is")
"""The only setting of a system without a dial."""


def dial_name(dial: AnyDial) -> str:
    """Return the name of a dial; equal dials have equal names.

    Example:
        >>> dial_name(Adaptive(0.5, "agreement"))
        'adaptive 0.5 measure=agreement'
    """
    if isinstance(dial, Fixed):
        return f"λ={dial.lam:g}"
    form: Any = dial.to_json()

    if isinstance(dial, Policy | Ladder):
        given = {key: value for key, value in form.items() if key != "policy"}
        first = _SHORT[form["policy"]]
        words = [form["policy"]]
        if first in given:
            words.append(_digits(given.pop(first)))
        return " ".join([*words, *(f"{key}={_word(value)}" for key, value in given.items())])

    return json.dumps(form, ensure_ascii=False, separators=(", ", ": "))


def _word(value: object) -> str:
    """Return a value as one word; a text with white space in it is quoted."""
    if isinstance(value, list | tuple):
        return _digits(value)
    has_space = isinstance(value, str) and any(letter.isspace() for letter in value)
    return json.dumps(value, ensure_ascii=False) if has_space else str(value)


def _digits(value: float | Sequence[float]) -> str:
    """Return a number, or several with commas between, with six digits."""
    numbers_ = value if isinstance(value, list | tuple) else [value]
    return ",".join(f"{number:g}" for number in numbers_)


def setting_label(setting: str, effort: float | None) -> str:
    """Return a setting's name in tables: the requested effort, if any, and then its id.

    Example:
        >>> setting_label("λ=0.42", 50)
        'effort 50 (λ=0.42)'

    Args:
        setting: The setting's id.
        effort: The requested effort; None if the dial itself was requested.
    """
    return setting if effort is None else f"effort {effort:g} ({setting})"


def unique_settings(values: Sequence[object]) -> list[Setting]:
    """Make settings from several dials; values that are settings already are kept.

    Raises:
        ConfigError: If two have the same id: they are equal, or equal to six digits.
    """
    settings = [value if isinstance(value, Setting) else Setting.of(value) for value in values]
    seen: dict[str, Setting] = {}
    for setting in settings:
        first = seen.setdefault(setting.id, setting)
        if first is setting:
            continue

        if first.label == setting.label:
            raise ConfigError(f"the setting {setting.label} is given twice; leave one out.")
        raise ConfigError(
            f"{first.label} and {setting.label} are one and the same setting; leave one out."
        )
    return settings


# Permitted ranges.

FORWARD = (0.0, math.inf)
"""The range of a pair without a given range: any λ that does not lead away from the alignment."""


class OnlyEnds(tuple[float, float]):
    """A permitted range without what is between its ends: that of a LoRA trained at λ = 1 alone."""

    __slots__ = ()


def extremes(dial: AnyDial | LambdaRange) -> tuple[float, float]:
    """Return the least and the largest λ that a dial, or a range, may use.

    Example:
        >>> extremes(Adaptive(fast_lambda=1.5))
        (0.0, 1.5)
    """
    if isinstance(dial, Fixed):
        return dial.lam, dial.lam
    if isinstance(dial, Schedule | LambdaRange):
        return min(dial.values), max(dial.values)
    if isinstance(dial, Ladder):
        return min(dial.lambdas), max(dial.lambdas)
    ends = (dial.fast_lambda, dial.slow_lambda)
    return min(ends), max(ends)


def outside_range(dial: AnyDial | LambdaRange, permitted: tuple[float, float]) -> float | None:
    """Return a λ that a dial may use outside the permitted range; None if there is none.

    All checks of a range use this function; each caller has its own message.

    Args:
        dial: The dial.
        permitted: The least and the largest λ.
    """
    low, high = permitted
    if isinstance(permitted, OnlyEnds):
        return next((lam for lam in _visited(dial) if lam not in permitted), None)
    return next((lam for lam in extremes(dial) if not low <= lam <= high), None)


def _visited(dial: AnyDial | LambdaRange) -> tuple[float, ...]:
    """Return the λ that a dial uses; of a schedule between two values, also the middle."""
    if isinstance(dial, Ladder):
        return dial.lambdas
    if not isinstance(dial, Schedule):
        return extremes(dial)
    low, high = extremes(dial)
    jumps = dial.kind == "thinking" and dial.budget is None
    return (low, high) if jumps or low == high else (low, high, (low + high) / 2)


def require_range(
    permitted: tuple[float, float],
    asked: Sequence[tuple[str, AnyDial]],
    whose: str,
    permit: str = "start with --lambda-range LEAST,LARGEST",
) -> None:
    """Refuse dials that may use a λ outside the permitted range.

    Args:
        permitted: The least and the largest λ.
        asked: Names and dials.
        whose: The owner of the range, for the message, such as ``the adapter out/fast``.
        permit: The instruction, for the message, that permits such a λ.

    Raises:
        LambdaError: If there is such a dial; the message says how to permit it.
    """
    outside = [name for name, dial in asked if outside_range(dial, permitted) is not None]
    if outside and isinstance(permitted, OnlyEnds):
        raise LambdaError(f"{', '.join(outside)}: {ends_alone(permitted, whose, permit)}")
    if outside:
        low, high = permitted
        raise LambdaError(
            f"{', '.join(outside)}: outside the range [{low:g}, {high:g}] of {whose}; if "
            f"you mean it, {permit}."
        )


def ends_alone(permitted: OnlyEnds, whose: str, permit: str) -> str:
    """Return why a dial has only its two ends, and what to do, for messages."""
    low, high = permitted
    return (
        f"{whose} is a plain LoRA, trained at one strength, which has λ = {low:g} and {high:g} alone; "
        f"train one for a range of λ (flexalign realign --lambda 0:5 with lora), measure it scaled as "
        f"lora:BASE,ADAPTER in flexalign evaluate, or, if you mean it, {permit}."
    )


def require_forward(asked: Sequence[tuple[str, AnyDial | LambdaRange]], permit: str) -> None:
    """Refuse dials of a pair that may use a λ below 0.

    Fusion itself accepts any finite λ; this check is for the tools that train and measure with it.

    Args:
        asked: Names and dials.
        permit: The instruction, for the message, that permits such a λ.

    Raises:
        LambdaError: If there is such a dial; the message says why, and how to permit it.
    """
    away = [name for name, dial in asked if outside_range(dial, FORWARD) is not None]
    if away:
        raise LambdaError(
            f"{', '.join(away)}: λ < 0 leads away from the aligned model, which on a chat pair "
            f"undoes its safety training (docs/lambda.md); if you mean it, {permit}."
        )


def parse_range(text: str) -> tuple[float, float]:
    """Read ``--lambda-range -1,2``.

    Returns:
        The least and the largest λ.

    Raises:
        LambdaError: If it is not two numbers in ascending order.
    """
    with suppress(LambdaError):
        least, *rest = parse_lambdas(text)
        if len(rest) == 1 and least.lam <= rest[0].lam:
            return least.lam, rest[0].lam
    raise LambdaError(f"--lambda-range takes LEAST,LARGEST, such as -1,2; got {text!r}.")
