"""OpenAI's protocol: reads the bodies of requests and writes answers, whole or as stream chunks.

A body is read up to a limit and parsed once (:func:`read_json`). The form of each route's body is a
pydantic model (:class:`ChatBody`, :class:`CompletionBody`), which ``/docs`` shows; :func:`read_chat`
and :func:`read_completion` turn it into the service's request. A key that would change an answer and
is not served is refused by name. An :class:`AnswerFormat` builds an answer, which an
:class:`AnswerEncoder` serialises once.
"""

import json
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
)

from flexalign.data.logits import LogitsSettings
from flexalign.data.thinking import ThinkingTags
from flexalign.generation.text import StreamedSplit, overlap
from flexalign.serving.dial import DialChoice, DialFields
from flexalign.serving.engine import AnswerPiece, WrittenToken
from flexalign.serving.errors import ApiError, Scope, as_sent
from flexalign.serving.keys import BodyKeys
from flexalign.serving.requests import (
    AnswerDraft,
    ChatRequest,
    CompletionRequest,
    SamplingOptions,
    TokenIds,
    Usage,
)
from flexalign.serving.tools import ParsedCalls, ToolAnswers

# The bytes of a request.

BODY_LIMIT = 4 << 20
"""The default limit of a body, in bytes."""

_DEEPEST = 64
"""How deep the values of a body may nest."""

_SUCH_AS = 'such as {"messages": [{"role": "user", "content": "1+2?"}]}'

_READ_ON = 16
"""A body of up to this many times the limit is read to its end before it is refused."""


async def read_json(scope: Scope, receive: Any, limit: int) -> dict[str, Any] | None:
    """Return a request's body as a JSON object; None if the client has disconnected.

    Raises:
        ApiError: If the body is too long, is not declared as JSON, is not a JSON object, or nests
            too deep.
    """
    content = await read_body(scope, receive, limit)
    if content is None:
        return None
    _require_json(scope)
    return parse_body(content)


async def read_body(scope: Scope, receive: Any, limit: int) -> bytes | None:
    """Return a request's body; None if the client has disconnected.

    Bytes over the limit are read and discarded, up to 16 times the limit: a client that is cut off
    while it writes reports a broken connection instead of the reason.

    Args:
        scope: The request's ASGI scope.
        receive: The request's ASGI receive function, not called before.
        limit: The longest body in bytes.

    Raises:
        ApiError: If the body is longer.
    """
    announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    most = limit * _READ_ON
    is_refused = announced.isdigit() and int(announced) > most

    content, length = bytearray(), 0
    while not is_refused:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        length += len(part)
        if length <= limit:
            content += part
        is_refused = length > most
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


def _require_json(scope: Scope) -> None:
    """Refuse a body that is not declared as JSON.

    A browser lets a page of any site send such a body without asking this server first.
    """
    given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"content-type"), "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"the body is said to be {given[:80] or 'of no type'}; say that it is JSON, with curl by "
            "-H 'content-type: application/json'.",
            code="invalid_content_type",
        )


def parse_body(content: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object.

    Raises:
        ApiError: If it is not a JSON object, nests too deep, or contains text that is not valid
            Unicode.
    """
    try:
        body = json.loads(content)
        is_deep = _is_deeper(body, _DEEPEST)
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
    if is_deep:
        raise ApiError(
            400,
            f"the body nests values more than {_DEEPEST} deep; no request needs that.",
            code="invalid_json",
        )
    return body


def _is_deeper(value: Any, most: int) -> bool:
    """Return whether a value nests more than ``most`` deep.

    The limit protects code that reads, compares and prints a value recursively.

    Raises:
        UnicodeEncodeError: If a text in the value contains half a surrogate pair, which JSON can
            escape and no encoding can write.
    """
    level, depth = [value], 0
    while level:
        if depth > most and any(isinstance(one, dict | list) for one in level):
            return True
        # Encoding is only a check: it raises at half a surrogate pair.
        "".join(one for one in level if isinstance(one, str)).encode()

        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                inner += one
        level, depth = inner, depth + 1
    return False


# The bodies of OpenAI's routes.

WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key"),
    *("safety_identifier", "prompt_cache_retention"),
}
"""Keys that are accepted and have no effect."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Keys that are known but not served, and the values at which they have no effect."""

_MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_BIAS = 100
_MOST_BIASES = 1024
_MOST_LOGPROBS = 20
_MOST_TOOLS = 128

_ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles of a message; templates render others as they please, or not at all."""

_SUCH_AS_MESSAGE = 'such as {"role": "user", "content": "1+2?"}'
_SUCH_AS_TOOL = 'such as {"type": "function", "function": {"name": "add", "parameters": {}}}'
_SUCH_AS_PART = 'such as {"type": "text", "text": "1+2?"}'


def _read_messages(given: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(given, list) or not given:
        wanted = f"a list of at least one message, {_SUCH_AS_MESSAGE}"
        raise _wrong("messages", wanted, given)
    return tuple(_read_message(message, index) for index, message in enumerate(given))


def _read_message(given: object, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise _wrong(where, f"an object with a role, {_SUCH_AS_MESSAGE}", given)
    if given["role"] not in _ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}", given["role"])

    content = given.get("content")
    if content is None and given["role"] == "assistant":
        content = ""  # as clients send a turn that was a tool's call
    if isinstance(content, list):
        parts = enumerate(content)
        content = "".join(_read_part(part, f"{where}.content[{place}]") for place, part in parts)
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", f"a text or a list of parts, {_SUCH_AS_PART}", content)
    return {**given, "content": content}


def _read_part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise _wrong(where, f"a part of the type text, {_SUCH_AS_PART}", part)


def _read_tools(given: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(given, list) or len(given) > _MOST_TOOLS:
        raise _wrong("tools", f"a list of at most {_MOST_TOOLS} tools, {_SUCH_AS_TOOL}", given)
    for place, tool in enumerate(given):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"tools[{place}]", f"a function with a name, {_SUCH_AS_TOOL}", tool)
        if tool.get("type", "function") != "function":
            raise _wrong(f"tools[{place}].type", '"function"', tool["type"])
    return tuple({"type": "function", **tool} for tool in given)


def _read_format(given: object) -> dict[str, Any] | bool | None:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    form = given.get("json_schema") if isinstance(given, dict) and kind == "json_schema" else None
    schema = form.get("schema") if isinstance(form, dict) else None
    if isinstance(schema, dict | bool):
        return schema
    wanted = '{"type": "text"}, {"type": "json_object"}, or a type json_schema with a json_schema'
    raise _wrong("response_format", f"{wanted}.schema", given)


def _read_prompts(given: object) -> tuple[str | TokenIds, ...]:
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and _are_ids(given):
        return (tuple(given),)
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


def _read_stops(given: object) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("stop", "a text or a list of texts, none of them empty", given)
    if len(stops) > _MOST_STOPS:
        raise ValueError(f"stop must be at most {_MOST_STOPS} texts, got {len(stops)}.")
    return tuple(stops)


def _above_zero(key: str, most: int) -> BeforeValidator:
    """Return a validator that refuses 0; pydantic's own limits refuse the rest."""

    def refuse_zero(value: object) -> object:
        if value == 0 and not isinstance(value, bool):
            raise _wrong(key, f"a number above 0 and at most {most}", value)
        return value

    return BeforeValidator(refuse_zero)


def _read_top_k(value: object) -> object:
    return 0 if value == -1 and not isinstance(value, bool) else value


def _read_biases(given: object) -> tuple[tuple[int, float], ...]:
    wanted = (
        f'an object of token ids and numbers from -{_MOST_BIAS} to {_MOST_BIAS}, {{"15": -100}}'
    )
    if not isinstance(given, dict) or len(given) > _MOST_BIASES:
        raise _wrong("logit_bias", f"{wanted}, {_MOST_BIASES} at most", given)

    biases = []
    for token, bias in given.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise _wrong("logit_bias", wanted, token)
        if not is_number or not abs(bias) <= _MOST_BIAS:
            raise _wrong("logit_bias", wanted, bias)
        if bias:
            biases.append((int(token), float(bias)))
    return tuple(biases)


def _wrong(where: str, wanted: str, given: object) -> ValueError:
    """Return the error of a wrong value; pydantic collects it, :func:`_refusal` reports it."""
    return ValueError(f"{where} must be {wanted}, got {as_sent(given)}.")


_NonEmpty = Annotated[str, StringConstraints(min_length=1)]

Messages = Annotated[
    tuple[dict[str, Any], ...],
    PlainValidator(_read_messages, json_schema_input_type=list[dict[str, Any]]),
]
"""The turns of a conversation, their contents as text."""

Prompts = Annotated[
    tuple[str | TokenIds, ...],
    PlainValidator(
        _read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
"""Texts or token ids."""

Tools = Annotated[
    tuple[dict[str, Any], ...],
    PlainValidator(_read_tools, json_schema_input_type=list[dict[str, Any]]),
]
"""The functions that an answer may call."""

ResponseFormat = Annotated[
    dict[str, Any] | bool | None,
    PlainValidator(_read_format, json_schema_input_type=dict[str, Any]),
]
"""The JSON schema of answers; None for text."""

Stops = Annotated[
    tuple[str, ...],
    PlainValidator(_read_stops, json_schema_input_type=_NonEmpty | list[_NonEmpty]),
]
"""Texts that end an answer."""

LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_read_biases, json_schema_input_type=dict[str, float]),
]
"""Token ids with what is added to their logits."""


class StreamOptions(BaseModel):
    """What a stream contains beside its answers."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="End with the token counts.")


class SamplingBody(BaseModel):
    """The keys of every route that writes answers. Null is the same as a key that is left out."""

    model_config = ConfigDict(strict=True)

    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: Annotated[float, _above_zero("top_p", 1)] = Field(
        1.0, ge=0, le=1, description="Probability mass sampled from; above 0."
    )
    top_k: Annotated[int, BeforeValidator(_read_top_k)] = Field(
        0, ge=0, description="Number of likeliest tokens sampled from; 0 or −1 for all."
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Least probability, as a share of the likeliest token's."
    )
    repetition_penalty: Annotated[float, _above_zero("repetition_penalty", 10)] = Field(
        1.0, ge=0, le=10, description="Of tokens in the prompt or the answer; 1 for none."
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from logits of tokens in the answer."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="The same, for each time that a token is in the answer."
    )
    logit_bias: LogitBias = Field(
        (),
        description=f"Token ids and what is added to their logits, −{_MOST_BIAS} to {_MOST_BIAS}.",
    )
    thinking_budget: int | None = Field(
        None, ge=0, description="Tokens of thinking after which the thinking is closed."
    )
    end_of_thinking_bias: float = Field(
        0.0,
        ge=-_MOST_BIAS,
        le=_MOST_BIAS,
        description="Added to the logit of the token that closes the thinking, inside it.",
    )
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="One seed gives one answer."
    )
    stop: Stops = Field(
        (), description=f"At most {_MOST_STOPS} texts that end an answer and are not in it."
    )
    n: int = Field(1, ge=1, le=_MOST_CHOICES, description="Answers to each prompt.")
    stream: bool = Field(False, description="Send the answer as it is written.")
    stream_options: StreamOptions | None = None
    model: str | None = Field(None, description="The name of the model that is served.")

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingOptions:
        """Return the service's sampling options; a seed is drawn if none was given."""
        options = self.stream_options
        return SamplingOptions(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            stop=self.stop,
            n=self.n,
            logprobs=logprobs,
            stream=self.stream,
            include_usage=bool(options and options.include_usage),
            logits=LogitsSettings(
                self.top_k,
                self.min_p,
                self.repetition_penalty,
                self.presence_penalty,
                self.frequency_penalty,
                self.logit_bias,
                self.thinking_budget,
                self.end_of_thinking_bias,
            ),
        )


class ChatBody(SamplingBody):
    """A body of ``/v1/chat/completions`` without the keys of the dial."""

    logprobs: bool = Field(False, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=_MOST_LOGPROBS, description="Likeliest tokens to tell at each token."
    )
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens at which an answer is cut off; all there is room for if not.",
    )
    max_tokens: int | None = Field(None, ge=1, description="The same, by its older name.")
    messages: Messages = Field(description="Each has a role and a content.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments that the chat template reads, such as enable_thinking.",
    )
    tools: Tools = Field(
        (), description="Functions that the answer may call; the chat template must read them."
    )
    response_format: ResponseFormat = Field(
        None, description="What the answer after the thinking follows: text, or a JSON schema."
    )


class CompletionBody(SamplingBody):
    """A body of ``/v1/completions`` without the keys of the dial."""

    max_tokens: int = Field(16, ge=1, description="Tokens at which an answer is cut off.")
    logprobs: int | None = Field(
        None, ge=0, le=_MOST_LOGPROBS, description="Likeliest tokens to tell at each token."
    )
    prompt: Prompts = Field(description="Texts or token ids to be continued.")


_Body = TypeVar("_Body", bound=BaseModel)


def read_chat(body: Mapping[str, Any], choice: DialChoice | None = None) -> ChatRequest:
    """Read the body of a chat request.

    Args:
        body: The body without the keys of the dial.
        choice: The request's dial; if not given, that of a model without a dial.

    Raises:
        ApiError: If a value is missing, malformed or not served; its message names the key.
    """
    form = _read(ChatBody, body)
    if form.top_logprobs is not None and not form.logprobs:
        raise _bad("top_logprobs", 'top_logprobs needs "logprobs": true.')

    logprobs = (form.top_logprobs or 0) if form.logprobs else None
    limit = form.max_completion_tokens or form.max_tokens  # neither is 0
    sampling = form.sampling(limit, logprobs)
    choice = choice or DialChoice(None)
    template = {**choice.template, **form.chat_template_kwargs}
    # With "none" no tool may be called, and the model does not hear of any.
    tools = () if body.get("tool_choice") == "none" else form.tools
    if tools and form.response_format is not None:
        raise _bad("response_format", "response_format: with tools the answer is text; give one.")
    return ChatRequest(
        form.model, form.messages, sampling, choice, template, tools, form.response_format
    )


def read_completion(body: Mapping[str, Any], choice: DialChoice | None = None) -> CompletionRequest:
    """Read the body of a completion request.

    Args:
        body: The body without the keys of the dial.
        choice: The request's dial; if not given, that of a model without a dial.

    Raises:
        ApiError: If a value is missing, malformed or not served; its message names the key.
    """
    form = _read(CompletionBody, body)
    sampling = form.sampling(form.max_tokens, form.logprobs)
    return CompletionRequest(form.model, form.prompt, sampling, choice or DialChoice(None))


@cache
def body_keys(form: type[BaseModel], *, refuses: bool = True) -> BodyKeys:
    """Return the keys that bodies of a form may have, beside those of the dial.

    Args:
        form: The form of a route's bodies.
        refuses: Whether an unknown key is an error.
    """
    return BodyKeys.of(form, {*WITHOUT_EFFECT, *_NEUTRAL}, refuses=refuses)


def body_schema(form: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a route's body, the keys of the dial first.

    Args:
        form: The form of the body without the keys of the dial.
    """
    schema = form.model_json_schema()
    parts = schema.pop("$defs", {})
    schema["properties"] = DialFields.model_json_schema()["properties"] | schema["properties"]
    inlined: dict[str, Any] = _inlined(schema, parts)
    return inlined


def _inlined(schema: Any, parts: Mapping[str, Any]) -> Any:
    """Return a schema with its references replaced by what they refer to.

    References start at the root of a document, and this schema becomes a part of a larger one.
    """
    if isinstance(schema, list):
        return [_inlined(one, parts) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {key: _inlined(value, parts) for key, value in schema.items()}


def _read(form: type[_Body], body: Mapping[str, Any]) -> _Body:
    """Validate a body against its form; errors have this server's own messages, not pydantic's."""
    body_keys(form).sort_out(dict(body))
    _refuse_unserved({key: one for key, one in body.items() if key not in form.model_fields})
    given = {key: value for key, value in body.items() if value is not None}
    # A required key that is missing becomes null, so that its own validator words the error.
    required = [name for name, field in form.model_fields.items() if field.is_required()]
    try:
        return form.model_validate(dict.fromkeys(required) | given)
    except ValidationError as error:
        raise _refusal(form, error) from error


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    for key, value in body.items():
        if value is not None and key in _NEUTRAL and value not in _NEUTRAL[key]:
            served = " or ".join(map(as_sent, _NEUTRAL[key]))
            raise _bad(
                key, f"{key} is served at {served} alone, got {as_sent(value)}; leave it out."
            )


def _refusal(form: type[BaseModel], error: ValidationError) -> ApiError:
    """Return the error of the first value that the form refuses."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    if first["type"] == "value_error":  # raised in this module, with its message
        return _bad(key, str(first["ctx"]["error"]))

    words = {
        "bool_type": "true or false",
        "string_type": "a text",
        "model_type": 'an object, such as {"include_usage": true}',
        "dict_type": 'an object, such as {"enable_thinking": false}',
    }
    wanted = words.get(first["type"]) or _number_in_words(form, key)
    where = ".".join(map(str, first["loc"]))
    return _bad(key, f"{where} must be {wanted}, got {as_sent(first['input'])}.")


def _number_in_words(form: type[BaseModel], key: str) -> str:
    """Describe the values of a numeric field by its limits, such as "a number from 0 to 2"."""
    field = form.model_fields[key]
    limits: dict[str, Any] = {}
    for constraint in field.metadata:
        limits |= {
            end: getattr(constraint, end) for end in ("ge", "le") if hasattr(constraint, end)
        }

    least, largest = limits["ge"], limits.get("le")
    kinds = get_args(field.annotation) or (field.annotation,)
    number = "a whole number" if int in kinds else "a number"
    return f"{number} ≥ {least}" if largest is None else f"{number} from {least} to {largest}"


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


# Answers, whole or in chunks.


class AnswerFormat(ABC):
    """Writes the answers to one request: an id, a time, the model's name, the choices and the dial.

    Subclasses write a choice, as a whole and piece by piece.

    Attributes:
        prefix: What the id begins with.
        whole: The ``object`` of a whole answer.
        part: The ``object`` of a chunk.
    """

    prefix = ""
    whole = ""
    part = ""

    def __init__(self, model: str, tokenizer: Any, tags: ThinkingTags, choice: DialChoice) -> None:
        """Prepare for a request.

        Args:
            model: The model's name in requests.
            tokenizer: Its tokenizer.
            tags: The tags around its thinking.
            choice: The request's dial; its report is read each time an answer or chunk is written.
        """
        self.tags = tags
        self.tokenizer = tokenizer
        self._choice = choice
        self._is_begun = False
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.part,
            "created": int(time.time()),
            "model": model,
        }

    def answer(
        self, drafts: Sequence[AnswerDraft], logprobs: int | None, usage: Usage
    ) -> dict[str, Any]:
        """Return a whole answer.

        Args:
            drafts: The answers, all ended.
            logprobs: The number of likeliest tokens at each token; None for no log-probabilities.
            usage: The request's token counts.
        """
        choices = [
            {
                **self.choice(draft, logprobs),
                "index": draft.index,
                "finish_reason": self.finish(draft),
            }
            for draft in drafts
        ]
        answer = {**self._head, "object": self.whole, "choices": choices, "usage": as_json(usage)}
        return self._with_dial(answer)

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream; the first one and those that end an answer have the dial."""
        chunk = {**self._head, "choices": list(choices), **more}
        ends = not choices or any(choice["finish_reason"] for choice in choices)
        if self._is_begun and not ends:
            return chunk
        self._is_begun = True
        return self._with_dial(chunk)

    def finish(self, draft: AnswerDraft) -> str | None:
        """Return why an answer ended; None while it is written."""
        return draft.finish

    def opening(self, draft: AnswerDraft) -> list[dict[str, Any]]:
        """Return the choices, one for each chunk, that precede an answer's first piece."""
        return []

    @abstractmethod
    def choice(self, draft: AnswerDraft, logprobs: int | None) -> dict[str, Any]:
        """Return a choice of a whole answer, without its index and finish reason."""

    @abstractmethod
    def choices_of(
        self, draft: AnswerDraft, piece: AnswerPiece, logprobs: int | None
    ) -> list[dict[str, Any]]:
        """Return the choices of a piece, one for each chunk; the draft contains the piece already."""

    def _with_dial(self, answer: dict[str, Any]) -> dict[str, Any]:
        if self._choice.report:  # empty on a model without a dial
            answer["dial"] = self._choice.report
        return answer

    def _name(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatFormat(AnswerFormat):
    """Answers of ``/v1/chat/completions``.

    The thinking is separate from the content, under both names that clients read.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Any, tags: ThinkingTags, choice: DialChoice) -> None:
        """Prepare for a request; the arguments are those of :class:`AnswerFormat`."""
        super().__init__(model, tokenizer, tags, choice)
        self._splits: dict[int, StreamedSplit] = {}
        self._tools: ToolAnswers | None = None
        self._parsed: dict[int, ParsedCalls | None] = {}
        self._held: dict[int, str] = {}

    def read_calls(self, tools: ToolAnswers) -> None:
        """Read calls of tools in the answers."""
        self._tools = tools if tools.is_parsed else None

    def finish(self, draft: AnswerDraft) -> str | None:
        """Return why an answer ended; None while it is written."""
        return "tool_calls" if self._calls(draft) else draft.finish

    def opening(self, draft: AnswerDraft) -> list[dict[str, Any]]:
        """Return the choice that names the role."""
        self._splits[draft.index] = StreamedSplit(self.tags, opened=draft.opened)
        delta = {"role": "assistant", "content": ""}
        return [{"index": draft.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(self, draft: AnswerDraft, logprobs: int | None) -> dict[str, Any]:
        """Return the message."""
        thinking, answer, _ = self.tags.split(draft.text, opened=draft.opened)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer,
            "reasoning": thinking or None,
            "reasoning_content": thinking or None,
            "refusal": None,
        }
        parsed = self._calls(draft)
        if parsed is not None:
            message |= {"content": parsed.content, "tool_calls": parsed.calls}
        return {"message": message, "logprobs": self._logprobs(draft.tokens, logprobs)}

    def choices_of(
        self, draft: AnswerDraft, piece: AnswerPiece, logprobs: int | None
    ) -> list[dict[str, Any]]:
        """Return a delta for thinking, one for the answer, or both."""
        parts = self._splits[draft.index].put(piece.text, is_last=piece.ended is not None)
        deltas: list[dict[str, Any]] = []
        for text, is_thinking in parts:
            if is_thinking:
                deltas.append({"reasoning": text, "reasoning_content": text})
            elif shown := text if self._tools is None else self._before_calls(draft, text):
                deltas.append({"content": shown})
        if piece.ended is not None and self._tools is not None:
            deltas += self._last_deltas(draft)

        # An end and log-probabilities are sent even if the piece has no text.
        if not deltas and (piece.ended or logprobs is not None):
            deltas = [{}]

        choices = []
        for place, delta in enumerate(deltas):
            is_last = place == len(deltas) - 1
            choices.append(
                {
                    "index": draft.index,
                    "finish_reason": self.finish(draft) if is_last else None,
                    "delta": delta,
                    "logprobs": None if place else self._logprobs(piece.tokens, logprobs),
                }
            )
        return choices

    def _calls(self, draft: AnswerDraft) -> ParsedCalls | None:
        """Return the calls of an answer that has ended normally; they are read once."""
        if self._tools is None or draft.finish != "stop":
            return None
        if draft.index not in self._parsed:
            self._parsed[draft.index] = self._tools.calls(draft)
        return self._parsed[draft.index]

    def _before_calls(self, draft: AnswerDraft, text: str) -> str:
        """Take more text of an answer; return what cannot be part of a call, and hold the rest."""
        marker = None if self._tools is None else self._tools.parser.marker
        held = self._held.get(draft.index, "") + text
        if marker is None:
            shown = ""
        elif marker in held:
            shown = held.partition(marker)[0]
        else:
            shown = held[: len(held) - overlap(held, marker)]
        self._held[draft.index] = held[len(shown) :]
        return shown

    def _last_deltas(self, draft: AnswerDraft) -> list[dict[str, Any]]:
        """Return what was held back at an answer's end: its calls, or text that is no call."""
        held, parsed = self._held.pop(draft.index, ""), self._calls(draft)
        if parsed is None:
            return [{"content": held}] if held else []
        # With a marker, the text before the calls was sent already.
        is_sent = self._tools is not None and self._tools.parser.marker is not None
        content = None if is_sent else parsed.content
        calls = [{"index": place, **call} for place, call in enumerate(parsed.calls)]
        return [*([{"content": content}] if content else []), {"tool_calls": calls}]

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


class CompletionFormat(AnswerFormat):
    """Answers of ``/v1/completions``: the text unchanged, thinking tags included."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, draft: AnswerDraft, logprobs: int | None) -> dict[str, Any]:
        """Return the text."""
        return {"text": draft.text, "logprobs": self._logprobs(draft.tokens, logprobs, 0)}

    def choices_of(
        self, draft: AnswerDraft, piece: AnswerPiece, logprobs: int | None
    ) -> list[dict[str, Any]]:
        """Return the text of the piece."""
        offset = len(draft.text) - len(piece.text)
        return [
            {
                "index": draft.index,
                "finish_reason": draft.finish,
                "text": piece.text,
                "logprobs": self._logprobs(piece.tokens, logprobs, offset),
            }
        ]

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


def as_json(usage: Usage) -> dict[str, Any]:
    """Return token counts in OpenAI's form."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "rejected_prediction_tokens": usage.rejected_tokens,
        },
    }


class AnswerEncoder:
    """Serialises the answer to one request: here in OpenAI's form, which the objects have already.

    Another protocol overrides it. The objects are those of an :class:`AnswerFormat`, and errors as
    :meth:`ApiError.to_json` returns them.
    """

    def headers(
        self, headers: Iterable[tuple[bytes, bytes]], length: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Return the answer's headers.

        Args:
            headers: Those that the route gives it.
            length: The number of bytes of a whole answer; None for a stream.
        """
        return list(headers)

    def whole(self, answer: dict[str, Any]) -> bytes:
        """Return a whole answer."""
        return encode(answer)

    def error(self, error: dict[str, Any]) -> bytes:
        """Return an error in the place of a whole answer."""
        return json.dumps(error, ensure_ascii=False, separators=(",", ":")).encode()

    def begin(self) -> bytes:
        """Return the events before the first chunk of a stream."""
        return b""

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """Return the events of a chunk, or of an error in its place, which ends the stream."""
        return encode_event(chunk)

    def end(self) -> bytes:
        """Return the events after the last chunk."""
        return b"data: [DONE]\n\n"


def encode(value: object) -> bytes:
    """Return a value as JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode()


def encode_event(value: object) -> bytes:
    """Return a value as a server-sent event."""
    return b"data: " + encode(value) + b"\n\n"
