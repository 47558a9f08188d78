"""OpenAI's request bodies, read strictly: what would change an answer and is not served is refused."""

import json
import numbers
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from flexalign._spelling import nearest
from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import ResponseText, StreamedSplit
from flexalign.serving.engine import Ended, Piece, WrittenToken
from flexalign.serving.errors import ApiError, Scope, as_sent

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


# Answers in OpenAI's form, whole or as the chunks of a stream.


@dataclass
class Draft:
    """A choice of an answer, as it grows.

    Attributes:
        index: Its number.
        prompt_tokens: Tokens of its prompt.
        opened: Whether its prompt leaves the thinking open.
        text: Its text so far.
        tokens: Its tokens so far.
        ended: How it ended; None while it goes on.
    """

    index: int
    prompt_tokens: int
    opened: bool = False
    text: str = ""
    tokens: list[WrittenToken] = field(default_factory=list)
    ended: Ended | None = None

    def take(self, piece: Piece) -> None:
        """Take a piece in."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.ended = piece.ended


class AnswerForm(ABC):
    """What chats and completions have in common: an id, a time, a model's name.

    Subclasses say how a choice is told, as a whole and piece by piece.
    """

    prefix = ""
    whole = ""
    part = ""

    def __init__(self, model: str, tokenizer: Any, tags: ThinkingTags) -> None:
        self.tags = tags
        self.tokenizer = tokenizer
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.part,
            "created": int(time.time()),
            "model": model,
        }

    def answer(self, choices: Sequence[Draft], logprobs: int | None) -> dict[str, Any]:
        """Return a whole answer.

        Args:
            choices: All ended.
            logprobs: As the request asked for them.
        """
        told = [
            {**self.tell(choice, logprobs), "index": choice.index, "finish_reason": _reason(choice)}
            for choice in choices
        ]
        usage = count_usage(choices, self.tokenizer, self.tags)
        return {**self._head, "object": self.whole, "choices": told, "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self._head, "choices": list(choices), **more}

    def begin(self, choice: Draft) -> list[dict[str, Any]]:
        """Return the chunks, of one choice each, that stand before a choice's first piece."""
        return []

    @abstractmethod
    def tell(self, choice: Draft, logprobs: int | None) -> dict[str, Any]:
        """Return a choice of a whole answer, its index and its end left out."""

    @abstractmethod
    def tell_piece(self, choice: Draft, piece: Piece, logprobs: int | None) -> list[dict[str, Any]]:
        """Return what a piece, which the choice has taken in, adds to a stream."""

    def _part(self, choice: Draft, piece: Piece, is_last: bool = True) -> dict[str, Any]:
        reason = _reason(choice) if piece.ended and is_last else None
        return {"index": choice.index, "finish_reason": reason}

    def _name(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatForm(AnswerForm):
    """Answers of ``/v1/chat/completions``: the thinking apart, under both names it goes by."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Any, tags: ThinkingTags) -> None:
        super().__init__(model, tokenizer, tags)
        self._splits: dict[int, StreamedSplit] = {}

    def begin(self, choice: Draft) -> list[dict[str, Any]]:
        """Name the role."""
        self._splits[choice.index] = StreamedSplit(self.tags, opened=choice.opened)
        delta = {"role": "assistant", "content": ""}
        return [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def tell(self, choice: Draft, logprobs: int | None) -> dict[str, Any]:
        """Return the message."""
        thinking, answer, _ = self.tags.split(choice.text, opened=choice.opened)
        thought = thinking or None
        message = {"role": "assistant", "content": answer, "reasoning": thought}
        message |= {"reasoning_content": thought, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.tokens, logprobs)}

    def tell_piece(self, choice: Draft, piece: Piece, logprobs: int | None) -> list[dict[str, Any]]:
        """Return a delta for thinking, one for the answer, or both."""
        parts = self._splits[choice.index].put(piece.text, is_last=piece.ended is not None)
        deltas: list[dict[str, Any]] = [
            {"reasoning": text, "reasoning_content": text} if is_thinking else {"content": text}
            for text, is_thinking in parts
        ]
        if not deltas and (piece.ended or logprobs is not None):
            deltas = [{}]
        told = [
            {**self._part(choice, piece, place == len(deltas) - 1), "delta": delta}
            for place, delta in enumerate(deltas)
        ]
        for place, one in enumerate(told):
            one["logprobs"] = None if place else self._logprobs(piece.tokens, logprobs)
        return told

    def _logprobs(self, tokens: Sequence[WrittenToken], wanted: int | None) -> Any:
        if wanted is None:
            return None
        content = [
            {
                **self._token(token.token, token.logprob),
                "top_logprobs": [self._token(*other) for other in token.likeliest],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


class CompletionForm(AnswerForm):
    """Answers of ``/v1/completions``: the text as it is, tags and all."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def tell(self, choice: Draft, logprobs: int | None) -> dict[str, Any]:
        """Return the text."""
        return {"text": choice.text, "logprobs": self._logprobs(choice.tokens, logprobs, 0)}

    def tell_piece(self, choice: Draft, piece: Piece, logprobs: int | None) -> list[dict[str, Any]]:
        """Return the text that is new."""
        offset = len(choice.text) - len(piece.text)
        told = {"text": piece.text, "logprobs": self._logprobs(piece.tokens, logprobs, offset)}
        return [{**self._part(choice, piece), **told}]

    def _logprobs(self, tokens: Sequence[WrittenToken], wanted: int | None, offset: int) -> Any:
        if wanted is None:
            return None
        names = [self._name(token.token) for token in tokens]
        offsets = [offset + sum(map(len, names[:place])) for place in range(len(names))]
        top = [{self._name(i): logprob for i, logprob in token.likeliest} for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top if wanted else None,
            "text_offset": offsets,
        }


def count_usage(choices: Sequence[Draft], tokenizer: Any, tags: ThinkingTags) -> dict[str, Any]:
    """Count tokens as the library does: without the one that ends an answer, with rejected ones.

    Choices of one prompt count it once; those that go on do not count yet.
    """
    reader = ResponseText(tokenizer, tags)
    prompt = written = thinking = rejected = 0
    for choice, ended in ((choice, choice.ended) for choice in choices if choice.ended):
        prompt += choice.prompt_tokens
        rejected += ended.rejected_tokens
        written += len(ended.token_ids) + ended.rejected_tokens
        text = reader.read(ended.token_ids)
        thinking += tags.count_tokens(text, tokenizer, opened=choice.opened)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "completion_tokens_details": {
            "reasoning_tokens": thinking,
            "rejected_prediction_tokens": rejected,
        },
    }


def event(value: object) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _reason(choice: Draft) -> str | None:
    return choice.ended.finish if choice.ended else None


# Bodies of requests: read up to a limit, taken for JSON, and put back changed.

BODY_LIMIT = 4 << 20
"""The longest body in bytes, where an operator names no other."""

_DEEPEST = 64

_SUCH_AS = 'such as {"messages": [{"role": "user", "content": "1+2?"}]}'

_HEARD_OUT = 16
"""Bodies of up to so many times the limit are read to their end before they are refused."""


async def read_body(scope: Scope, receive: Any, limit: int) -> bytes | None:
    """Return a request's body; None if the client has gone.

    What is over the limit is read on and thrown away, up to a point: a client that is cut off in
    the middle of its writing sees a broken connection instead of the reason.

    Args:
        scope: The request's.
        receive: Likewise.
        limit: The longest body in bytes.

    Raises:
        ApiError: If it is longer.
    """
    announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    heard_out = limit * _HEARD_OUT
    is_refused = announced.isdigit() and int(announced) > heard_out
    content, length = bytearray(), 0
    while not is_refused:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        length += len(part)
        if length <= limit:
            content += part
        is_refused = length > heard_out
        if not message.get("more_body"):
            break
    if is_refused or length > limit:
        raise ApiError(
            413,
            f"the body is longer than the {limit} bytes that this server takes; shorten it.",
            code="body_too_large",
            headers={"connection": "close"},
        )
    return bytes(content)


def parse_body(content: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is.

    Raises:
        ApiError: If it is none, or nests too deep.
    """
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400,
            f"the body is no JSON ({str(error)[:200]}); send an object, {_SUCH_AS}.",
            code="invalid_json",
        ) from error
    if not isinstance(body, dict):
        raise ApiError(
            400,
            f"the body must be a JSON object, {_SUCH_AS}, got {as_sent(body)}.",
            code="invalid_json",
        )
    if _is_deeper(body, _DEEPEST):
        raise ApiError(
            400,
            f"the body nests values more than {_DEEPEST} deep; no request needs that.",
            code="invalid_json",
        )
    return body


def _is_deeper(value: Any, most: int) -> bool:
    """Whether a value nests deeper: what reads, compares and prints values does so recursively."""
    level = [value]
    for _ in range(most + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def with_body(scope: Scope, content: bytes | dict[str, Any], receive: Any) -> tuple[Scope, Any]:
    """Return a scope and a ``receive`` as if the request's body, which was read, were this one."""
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def replayed() -> Any:
        return parts.pop() if parts else await receive()

    return {**scope, "headers": with_length(scope["headers"], len(content))}, replayed


def with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """Return headers that announce a body's length."""
    dropped = (b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [*kept, (b"content-length", str(length).encode())]
