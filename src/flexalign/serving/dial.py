"""The dial of a request: its keys in the body, the values they may have, its report in the answer.

:class:`DialFields` declares the keys, :class:`DialRules` reads them within what the operator permits,
and a :class:`DialChoice` is the result. The value is parsed once
(:func:`flexalign.lambdas.parse_dial`) and checked once against the range; an engine does not check it
again. This module does not depend on an engine: the local server and vLLM use the same rules.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, Field, WithJsonSchema

from flexalign._spelling import misspelt
from flexalign.calibration.effort import Calibration, effort_to_dial, note_on_sampling
from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError, LambdaError
from flexalign.generation.dial_config import DialConfig
from flexalign.lambdas import (
    LAMBDA_LEGEND,
    Adaptive,
    Dial,
    Exit,
    Fixed,
    OnlyEnds,
    Schedule,
    outside_range,
    parse_dial,
)
from flexalign.serving.errors import ApiError, as_sent

DIAL_KEYS = ("lambda", "effort", "reasoning_effort", "control")
"""The keys of a body that set the dial; at most one may be given."""

EFFORT_LEVELS: Mapping[str, float | None] = {
    "none": 0,
    "minimal": 10,
    "low": 25,
    "medium": 50,
    "high": 75,
    "xhigh": 100,
    "max": None,
}
"""``reasoning_effort`` as an effort; None is the least λ of the permitted range."""

EFFORT_ARGUMENTS = ("reasoning_effort", "enable_thinking")
"""The arguments of chat templates that a ``reasoning_effort`` sets on a model without a dial."""

_FORMS = 'a finite number such as 0.5, "auto", or an object such as {"policy": "adaptive", "threshold": 0.5}'

_ELSEWHERE = {"reasoning": "effort", "output_config": "effort"}
"""Keys of other protocols that contain a ``reasoning_effort``; an engine may understand them."""

_USUAL = {
    "temperature": 1,
    "top_p": 1,
    **{one.name: one.default for one in fields(LogitsSettings) if one.name != "logit_bias"},
}
"""The defaults of a request's sampling, in OpenAI's protocol and in every engine here."""

_log = logging.getLogger("flexalign.serving")

_LAMBDA_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "number", "title": "λ"},
        {"const": "auto", "title": "adaptive, at the calibrated threshold"},
        {
            "type": "object",
            "title": "schedule",
            "required": ["kind"],
            "properties": {
                "kind": {"enum": ["constant", "linear", "cosine", "piecewise", "thinking"]}
            },
        },
        {
            "type": "object",
            "title": "policy",
            "required": ["policy"],
            "properties": {"policy": {"enum": ["fixed", "adaptive", "exit", "route"]}},
        },
    ],
    "examples": [
        0.5,
        "auto",
        {"kind": "thinking", "think": 0.0, "answer": 1.0},
        {"policy": "adaptive", "threshold": 0.5},
        {"policy": "exit", "threshold": 0.95},
        {"policy": "route", "share": 0.3},
    ],
}


class DialFields(BaseModel):
    """The keys of a body that set its dial. At most one of them may be given.

    The schema, which ``/docs`` shows, describes their values. The values are kept as they were sent:
    what they mean and whether they are permitted depends on the server, and :class:`DialRules` checks
    it.
    """

    lam: Annotated[Any, WithJsonSchema(_LAMBDA_SCHEMA)] = Field(
        None,
        alias="lambda",
        description=f"{LAMBDA_LEGEND}: a number, a schedule over the generated tokens, or a policy.",
    )
    effort: Annotated[Any, WithJsonSchema({"type": "number", "minimum": 0})] = Field(
        None,
        description="0 is the fastest answer, 100 spends the reference's tokens. Needs a calibrated "
        "dial.",
    )
    reasoning_effort: Annotated[Any, WithJsonSchema({"enum": list(EFFORT_LEVELS)})] = Field(
        None,
        description="A named effort: none 0, minimal 10, low 25, medium 50, high 75, xhigh 100, max "
        "the end of the permitted range. Ignored before calibration. On a model without a dial it is "
        "the chat template's reasoning_effort or enable_thinking, where it has them.",
    )
    control: Annotated[Any, WithJsonSchema(_LAMBDA_SCHEMA)] = Field(
        None, description="The same as lambda."
    )

    def given(self) -> dict[str, Any]:
        """Return the keys that are given, in the order of :data:`DIAL_KEYS`; null is not given."""
        values = (self.lam, self.effort, self.reasoning_effort, self.control)
        keyed = zip(DIAL_KEYS, values, strict=True)
        return {key: value for key, value in keyed if value is not None}


@dataclass
class DialChoice:
    """The dial of a request.

    Attributes:
        dial: The number, schedule or policy; None on a model without a dial.
        ignored: Keys of the body that had no effect.
        report: The answer's ``dial``; an engine adds the route that a policy took.
        template: Arguments of the chat template that ``reasoning_effort`` sets, on a model without
            a dial.
    """

    dial: Dial | None
    ignored: tuple[str, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)


NOT_CALIBRATED = (
    "this adapter is not calibrated, so that effort has no meaning here; give lambda, or let the "
    "operator run flexalign calibrate."
)
"""Why an adapter's server refuses an effort before calibration."""

PROMPTS_NOT_CALIBRATED = (
    "the two prompts of this server have no calibration, so that effort has no meaning here; give "
    "lambda, or let the operator run flexalign calibrate MODEL --aligned-prompt … and serve with "
    "--calibration FOLDER."
)
"""Why a server of two prompts refuses an effort without their calibration."""


@dataclass
class DialRules:
    """What dials a server permits, set by its operator.

    Attributes:
        default: The dial of a request that gives none; None for a model without a dial.
        lambda_range: The least and the largest λ that a request may use.
        effort: Returns the dial of an effort (0 is the fastest, 100 spends the reference's
            tokens); None before calibration.
        holes: Ranges of λ that calibration found worse than both neighbours.
        sampling: The sampling of the calibration, by the names of a request's keys. A request
            with other values is noted once in the log.
        template_effort: On a model without a dial, those of :data:`EFFORT_ARGUMENTS` that its chat
            template reads.
        without_effort: Why no effort is served and what to do, if `effort` is None.
    """

    default: Dial | None
    lambda_range: tuple[float, float] = (0.0, 1.0)
    effort: Callable[[float], Dial] | None = None
    holes: tuple[tuple[float, float], ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    template_effort: tuple[str, ...] = ()
    without_effort: str = NOT_CALIBRATED
    _has_warned: bool = field(default=False, init=False, repr=False)

    def to_json(self) -> dict[str, Any] | None:
        """Return the ``dial`` of ``/v1/models``; None for a model without a dial."""
        if self.default is None:
            return None
        return {
            "default": self.default.to_json(),
            "lambda_range": list(self.lambda_range),
            "effort": self.effort is not None,
            "meaning": LAMBDA_LEGEND,
        } | ({"only_ends": True} if isinstance(self.lambda_range, OnlyEnds) else {})

    def choose(self, body: dict[str, Any], *, is_chat: bool = True) -> DialChoice:
        """Read the dial of a body and remove its keys.

        Args:
            body: A request's body; the keys of the dial are removed from it.
            is_chat: Whether the prompt is rendered by the chat template.

        Raises:
            ApiError: If two dials are given, or one is misspelt, malformed or not permitted.
        """
        refuse_misspelt(body)
        given = DialFields.model_validate(body).given()
        for key in DIAL_KEYS:
            body.pop(key, None)

        # Clients send reasoning_effort unasked, so it is ignored where it has no meaning.
        ignored: tuple[str, ...] = ()
        level, template = None, dict[str, Any]()
        if self.default is None or self.effort is None:
            level = given.pop("reasoning_effort", None)
            if level and is_chat and self.default is None and self.template_effort:
                template = self._template_of(level, body.get("chat_template_kwargs"))
            ignored = ("reasoning_effort",) if level and not template else ()

        if len(given) > 1:
            raise _bad(
                list(given)[1], f"{' and '.join(given)} are {len(given)} dials; give one of them."
            )
        if not given:
            report = {"reasoning_effort": level, "template": template} if template else {}
            return DialChoice(self.default, ignored, report or self._report(self.default), template)

        # An exit policy needs no dial: a model with one stream answers on trial itself.
        [(key, value)] = given.items()
        is_exit = key in ("lambda", "control") and _is_exit(value)
        if self.default is None and not is_exit:
            raise _bad(key, f"{key}: this server's model has no dial; leave {key} out.")
        dial = self._read(key, value)

        if key in ("effort", "reasoning_effort"):
            self._note_sampling(body)
        extra = {"effort": value} if key == "effort" else {}
        return DialChoice(dial, ignored, self._report(dial) | extra)

    def _read(self, key: str, value: Any) -> Dial:
        try:
            if key == "reasoning_effort":
                dial = self._of_level(value)
            elif key == "effort":
                dial = self._of_effort(value)
            else:
                dial = _of_lambda(key, value)
            if self.default is not None:
                self._require_range(dial)
            _refuse_agreement(dial)
        except (ConfigError, LambdaError) as error:
            raise _bad(key, f"{key}: {error}") from error
        return dial

    def _template_of(self, level: object, given: object) -> dict[str, Any]:
        """Return the template's arguments of a level, without those that the request itself gives."""
        known = _known_level(level)
        values = {"reasoning_effort": known, "enable_thinking": known != "none"}
        own = given if isinstance(given, dict) else {}
        return {name: values[name] for name in self.template_effort if name not in own}

    def _of_level(self, value: object) -> Dial:
        effort = EFFORT_LEVELS[_known_level(value)]
        return Fixed(self.lambda_range[0]) if effort is None else self._of_effort(effort)

    def _of_effort(self, value: object) -> Dial:
        if self.effort is None:
            raise ConfigError(self.without_effort)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= sys.float_info.max:  # type: ignore[operator]
            raise _bad(
                "effort",
                "effort must be a number, 0 for the fastest answers and 100 for the reference's "
                f"tokens, got {as_sent(value)}.",
            )
        return self.effort(float(value))  # type: ignore[arg-type]

    def _require_range(self, dial: Dial) -> None:
        outside = outside_range(dial, self.lambda_range)
        if outside is not None and isinstance(self.lambda_range, OnlyEnds):
            raise LambdaError(
                f"λ = {outside:.12g}: this server's adapter is a plain LoRA, which has λ = "
                f"{self.lambda_range[0]:g} and {self.lambda_range[1]:g} alone; give one of them."
            )
        if outside is not None:
            low, high = self.lambda_range
            raise LambdaError(
                f"λ = {outside:.12g} is outside the range [{low:g}, {high:g}] that this server's "
                "operator permits; stay inside it."
            )

    def _report(self, dial: Dial | None) -> dict[str, Any]:
        """Return the report of a dial before the answer is written."""
        if dial is None:
            return {}

        report: dict[str, Any] = {"lambda": None, "policy": None, "route": None}
        if isinstance(dial, Fixed):
            report |= {"lambda": dial.lam, "policy": "fixed"}
        elif isinstance(dial, Schedule):
            report |= {"lambda": dial.to_json(), "policy": "schedule"}
        else:
            report["policy"] = dial.to_json()["policy"]
        if self.default is None:
            del report["lambda"]  # no λ has an effect

        for low, high in self.holes:
            if isinstance(dial, Fixed) and low < dial.lam < high:
                report["note"] = (
                    f"calibration found λ between {low:g} and {high:g} worse than both ends of it."
                )
        return report

    def _note_sampling(self, body: Mapping[str, Any]) -> None:
        asked = _USUAL | {name: body[name] for name in _USUAL if body.get(name) is not None}
        note = None if self._has_warned else note_on_sampling(self.sampling, asked)
        if note is not None:
            self._has_warned = True
            _log.warning(note)


def _known_level(value: object) -> str:
    if not isinstance(value, str) or value not in EFFORT_LEVELS:
        levels = ", ".join(EFFORT_LEVELS)
        raise _bad(
            "reasoning_effort",
            f"reasoning_effort must be one of {levels}, got {as_sent(value)}.",
        )
    return value


def _is_exit(value: object) -> bool:
    return isinstance(value, dict) and value.get("policy") == "exit"


def _of_lambda(key: str, value: object) -> Dial:
    if isinstance(value, dict):
        return parse_dial(value)
    if value == "auto":
        return Adaptive()
    try:
        return Fixed(value)  # type: ignore[arg-type]
    except LambdaError:
        raise _bad(key, f"{key} must be {_FORMS}, got {as_sent(value)}.") from None


def refuse_misspelt(body: dict[str, Any]) -> None:
    """Refuse a body with a misspelt key of the dial, or with a dial in a place that is not read.

    Raises:
        ApiError: If there is one; its message names the key that was meant.
    """
    if body.get("extra_body") is not None:
        raise _bad(
            "extra_body",
            "extra_body is an argument of OpenAI's Python client; over HTTP its keys stand beside "
            "the messages or the prompt.",
        )
    for key, inner in _ELSEWHERE.items():
        value = body.get(key)
        if isinstance(value, dict) and value.get(inner) is not None:
            raise _bad(key, f"{key}.{inner} is no dial here; did you mean 'reasoning_effort'?")
    for key in body:
        if key in DIAL_KEYS:
            continue
        meant = misspelt(key, DIAL_KEYS)
        if meant is not None:
            raise _bad(key[:80], f"{key[:80]!r} is no dial; did you mean {meant!r}?")


def _refuse_agreement(dial: Dial) -> None:
    if isinstance(dial, Adaptive | Exit) and dial.measure == "agreement":
        raise ConfigError(
            'the measure "agreement" samples several answers for one, which the server does not; '
            'take "answer_probability" or "min_token_probability".'
        )


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_dial")


def adapter_rules(
    settings: DialConfig, lambda_range: tuple[float, float] | None = None
) -> DialRules:
    """Return the rules of a server with an adapter, or with two prompts that are calibrated.

    Args:
        settings: The dial's configuration.
        lambda_range: The range that the operator permits; the dial's own range if not given.

    Raises:
        ConfigError: If the dial's default is not permitted, or its calibration cannot be read.
    """
    permitted = lambda_range or settings.lambda_range
    default = Fixed(settings.default_lambda)
    if outside_range(default, permitted) is not None:
        low, high = permitted
        raise ConfigError(
            f"the dial's default λ = {settings.default_lambda:g} is outside --lambda-range "
            f"[{low:g}, {high:g}]; permit it."
        )

    if settings.calibration is None:
        return DialRules(default, permitted)
    calibration = Calibration.from_json(settings.calibration)
    sampling = calibration.sampling
    return DialRules(
        default,
        permitted,
        effort=partial(effort_to_dial, calibration),
        holes=calibration.holes,
        sampling={name: sampling[name] for name in _USUAL if name in sampling},
    )
