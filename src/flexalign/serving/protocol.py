"""OpenAI's request bodies, read strictly: what would change an answer and is not served is refused."""

import numbers
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from flexalign._spelling import nearest
from flexalign.serving.errors import ApiError, as_sent

__all__ = ["ChatRequest", "CompletionRequest", "Sampling", "read_chat", "read_completion"]

_SAMPLING = ("temperature", "top_p", "max_tokens", "seed", "stop", "n", "stream", "stream_options")
_CHAT = ("messages", "max_completion_tokens", "logprobs", "top_logprobs")
_COMPLETION = ("prompt", "logprobs")
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key"),
    *("safety_identifier", "prompt_cache_retention"),
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
}
"""Keys that are known and not served, and the values at which they mean nothing."""

_MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_LOGPROBS = 20

_SUCH_AS_MESSAGE = 'such as {"role": "user", "content": "1+2?"}'
_SUCH_AS_PART = 'such as {"type": "text", "text": "1+2?"}'

TokenIds: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """What both kinds of request have in common.

    Attributes:
        max_tokens: Tokens at which an answer is cut off; None for as many as there is room for.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        seed: Of the first choice; drawn where the request gives none.
        stop: Texts that end an answer and are not in it.
        n: Choices per prompt.
        logprobs: Likeliest tokens to tell at each token, or None for no log-probabilities.
        stream: Whether the answer is sent as it is written.
        include_usage: Whether a stream ends with its token counts.
    """

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    n: int
    logprobs: int | None
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class ChatRequest:
    """A request for ``/v1/chat/completions``."""

    model: str | None
    messages: tuple[dict[str, Any], ...]
    sampling: Sampling


@dataclass(frozen=True)
class CompletionRequest:
    """A request for ``/v1/completions``; its prompts are texts or token ids."""

    model: str | None
    prompts: tuple[str | TokenIds, ...]
    sampling: Sampling


def read_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Read a chat's body, the dial taken out.

    Raises:
        ApiError: If a value is missing, malformed or not served; names the key.
    """
    _refuse_unknown(body, _CHAT)
    wants = _flag(body, "logprobs")
    top = _whole(body, "top_logprobs", 0, _MOST_LOGPROBS)
    if top is not None and not wants:
        raise _bad("top_logprobs", 'top_logprobs needs "logprobs": true.')
    limits = [_whole(body, key, 1, None) for key in ("max_completion_tokens", "max_tokens")]
    limit = next((limit for limit in limits if limit is not None), None)
    sampling = _sampling(body, limit, (top or 0) if wants else None)
    return ChatRequest(_text(body, "model"), _messages(body.get("messages")), sampling)


def read_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Read a completion's body, the dial taken out.

    Raises:
        ApiError: If a value is missing, malformed or not served; names the key.
    """
    _refuse_unknown(body, _COMPLETION)
    limit = _whole(body, "max_tokens", 1, None)
    logprobs = _whole(body, "logprobs", 0, _MOST_LOGPROBS)
    sampling = _sampling(body, 16 if limit is None else limit, logprobs)
    return CompletionRequest(_text(body, "model"), _prompts(body.get("prompt")), sampling)


def _sampling(body: Mapping[str, Any], limit: int | None, logprobs: int | None) -> Sampling:
    temperature = _number(body, "temperature", 0, 2, default=1)
    top_p = _number(body, "top_p", 0, 1, default=1)
    if top_p == 0:
        raise _wrong("top_p", "a number above 0 and at most 1", body["top_p"])
    seed = _whole(body, "seed", -(2**63), 2**63 - 1)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", 'an object, such as {"include_usage": true}', options)
    return Sampling(
        max_tokens=limit,
        temperature=temperature,
        top_p=top_p,
        seed=secrets.randbits(62) if seed is None else seed,
        stop=_stops(body.get("stop")),
        n=_whole(body, "n", 1, _MOST_CHOICES) or 1,
        logprobs=logprobs,
        stream=_flag(body, "stream"),
        include_usage=_flag(options or {}, "include_usage", within="stream_options"),
    )


def _refuse_unknown(body: Mapping[str, Any], own: tuple[str, ...]) -> None:
    known = {"model", *_SAMPLING, *own}
    for key, value in body.items():
        if key in known or key in _WITHOUT_EFFECT or value is None:
            continue
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                served = " or ".join(map(as_sent, _NEUTRAL[key]))
                raise _bad(
                    key, f"{key} is served at {served} alone, got {as_sent(value)}; leave it out."
                )
            continue
        hint = nearest(key[:80], known, otherwise="leave it out")
        raise _bad(key[:80], f"{key[:80]!r} is not known to this server{hint}")


def _messages(given: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(given, list) or not given:
        raise _wrong("messages", f"a list of at least one message, {_SUCH_AS_MESSAGE}", given)
    return tuple(_message(message, index) for index, message in enumerate(given))


def _message(given: object, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise _wrong("messages", f"an object with a role, {_SUCH_AS_MESSAGE}", given, where)
    content = given.get("content")
    if content is None and given["role"] == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join(
            _part(part, f"{where}.content[{place}]") for place, part in enumerate(content)
        )
    if not isinstance(content, str):
        wanted = f"a text or a list of parts, {_SUCH_AS_PART}"
        raise _wrong("messages", wanted, content, f"{where}.content")
    return {**given, "content": content}


def _part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise _wrong("messages", f"a part of the type text, {_SUCH_AS_PART}", part, where)


def _prompts(given: object) -> tuple[str | TokenIds, ...]:
    if isinstance(given, str):
        return (given,)
    if _are_ids(given):
        return (tuple(given),)  # type: ignore[arg-type]
    if isinstance(given, list) and given:
        if all(isinstance(one, str) for one in given):
            return tuple(given)
        if all(_are_ids(one) for one in given):
            return tuple(tuple(one) for one in given)
    wanted = 'a text such as "1+2?", a list of texts, a list of token ids, or a list of such lists'
    raise _wrong("prompt", wanted, given)


def _are_ids(given: object) -> bool:
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
    )


def _stops(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("stop", "a text or a list of texts, none of them empty", given)
    if len(stops) > _MOST_STOPS:
        raise _bad("stop", f"stop must be at most {_MOST_STOPS} texts, got {len(stops)}.")
    return tuple(stops)


def _text(body: Mapping[str, Any], key: str) -> str | None:
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(key, "a text", value)
    return value


def _flag(body: Mapping[str, Any], key: str, within: str | None = None) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        where = f"{within}.{key}" if within else key
        raise _wrong(within or key, "true or false", value, where)
    return bool(value)


def _whole(body: Mapping[str, Any], key: str, least: int, largest: int | None) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (largest is not None and value > largest):
        limits = f"≥ {least}" if largest is None else f"from {least} to {largest}"
        raise _wrong(key, f"a whole number {limits}", value)
    return int(value)


def _number(
    body: Mapping[str, Any], key: str, least: float, largest: float, *, default: float
) -> float:
    value = body.get(key)
    if value is None:
        return default
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= largest:
        raise _wrong(key, f"a number from {least:g} to {largest:g}", value)
    return float(value)


def _wrong(param: str, wanted: str, given: object, where: str | None = None) -> ApiError:
    """Say of a value what it must be; ``where`` is its place, if that is not the key itself."""
    return _bad(param, f"{where or param} must be {wanted}, got {as_sent(given)}.")


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
