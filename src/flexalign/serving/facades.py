"""Other protocols over the chat service: OpenAI's ``/v1/responses`` and Anthropic's ``/v1/messages``.

A :class:`Facade` is ASGI middleware before either engine. It turns a request of its protocol into one
of ``/v1/chat/completions``, and the answer of that route, whole or as a stream, into the form of its
protocol. The dial, the sampling, the limits and the errors are those of the chat route. Both protocols
are stateless here: nothing is stored between two requests.

A :class:`Translation` holds the chat request and encodes the answer's objects. The local server takes
it from the request's scope, so that the request is parsed once and the answer is serialised once. vLLM
takes and sends bytes: there the facade serialises the chat request and parses the chat answer.
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from flexalign._spelling import misspelt
from flexalign.serving.dial import DIAL_KEYS
from flexalign.serving.errors import ApiError, Scope, as_sent
from flexalign.serving.keys import IGNORED, BodyKeys, ignored_value
from flexalign.serving.middleware import path_of, with_body, with_length
from flexalign.serving.protocol import (
    BODY_LIMIT,
    AnswerEncoder,
    encode,
    encode_event,
    read_json,
)

CHAT = "/v1/chat/completions"
"""The route that answers."""

TRANSLATION = "flexalign.translation"
"""Under this name the scope of a request to the local server's chat route holds its
:class:`Translation`, if it is of another protocol; its body has been read then."""


class AnswerWriter(ABC):
    """Writes one answer in the form of a protocol, from that of the chat route."""

    @abstractmethod
    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the answer; ``answer`` is a whole one of the chat route."""

    @abstractmethod
    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the first text."""

    @abstractmethod
    def take(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of one chunk of the chat route's stream."""

    @abstractmethod
    def end(self) -> Iterator[dict[str, Any]]:
        """Yield the events after the last chunk."""

    @abstractmethod
    def failed(self, error: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream that ends in an error, which is in the chat route's form."""


class Facade(ABC):
    """A protocol's route, before a server that has the chat route.

    Attributes:
        path: The route.
        own: The keys of this protocol that a message about an unknown one may suggest.
        renamed: The keys of the chat route that have another name in this protocol.
    """

    path: ClassVar[str]
    own: ClassVar[tuple[str, ...]]
    renamed: ClassVar[frozenset[str]]

    def __init__(
        self,
        app: Any,
        keys: BodyKeys | None = None,
        *,
        body_limit: int = BODY_LIMIT,
        takes_objects: bool = False,
    ) -> None:
        """Stand before an application.

        Args:
            app: An ASGI application with the chat route.
            keys: The keys that bodies of the chat route may have; None if they are not known.
            body_limit: The longest body in bytes.
            takes_objects: Whether its chat route takes a :data:`TRANSLATION`; else it gets the chat
                request as bytes, and its answer is parsed.
        """
        self._app = app
        self._keys = keys
        self._body_limit = body_limit
        self._takes_objects = takes_objects

    @abstractmethod
    def to_chat(self, body: dict[str, Any]) -> tuple[dict[str, Any], AnswerWriter, list[str]]:
        """Return the chat request of a body, the writer of its answer, and keys without effect.

        Keys that are not the protocol's own are passed on, so that the chat route judges them.

        Raises:
            ApiError: If a value is missing, malformed or not served.
        """

    def error(self, error: dict[str, Any]) -> dict[str, Any]:
        """Return an error of the chat route in the form of this protocol."""
        return error

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        is_asked = scope["type"] == "http" and scope["method"] == "POST"
        if not is_asked or path_of(scope) != self.path:
            await self._app(scope, receive, send)
            return

        try:
            body = await read_json(scope, receive, self._body_limit)
            if body is None:  # the client has disconnected
                return
            translation = Translation(self, *self.to_chat(body))
            self._refuse_unknown(translation.body)
        except ApiError as error:
            content = encode(self.error(error.to_json()))
            headers = [(key.encode(), value.encode()) for key, value in error.headers.items()]
            await _send_json(send, error.status, headers, content)
            return

        # The chat route's stream has the token counts in its last chunk only if they are asked for.
        if translation.body.get("stream"):
            translation.body["stream_options"] = {"include_usage": True}
        path = scope.get("root_path", "") + CHAT
        scope = {**scope, "path": path, "raw_path": path.encode()}
        if self._takes_objects:
            await self._app({**scope, TRANSLATION: translation}, receive, send)
            return
        scope, receive = with_body(scope, translation.body, receive)
        await self._app(scope, receive, _AnswerReader(translation, send))

    def _refuse_unknown(self, chat: Mapping[str, Any]) -> None:
        """Refuse a key that the chat route does not know, with the nearest of this protocol.

        What is close to a key of the dial is left to the chat route. Where unknown keys are no
        error, it names them in its header.
        """
        if self._keys is None or not self._keys.refuses:
            return
        suggested = [*self.own, *(key for key in self._keys.fields if key not in self.renamed)]
        for key, inner in self._keys.unknown(chat):
            is_dial = key in DIAL_KEYS or misspelt(key, DIAL_KEYS) is not None
            if not is_dial and key != "extra_body":
                raise self._keys.refusal(key, inner, suggested=suggested)


class Translation(AnswerEncoder):
    """A request of another protocol: the chat request that it makes, and its answer's encoding.

    Attributes:
        body: The body of the chat request.
    """

    def __init__(
        self, facade: Facade, body: dict[str, Any], writer: AnswerWriter, ignored: Sequence[str]
    ) -> None:
        """Translate one request; the last three arguments are what :meth:`Facade.to_chat` returns."""
        self.body = body
        self._facade = facade
        self._writer = writer
        self._ignored = ignored
        self._has_failed = False

    def headers(
        self, headers: Iterable[tuple[bytes, bytes]], length: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Return the headers of the chat answer, with the keys that have no effect here."""
        named = _with_ignored(headers, self._ignored)
        return named if length is None else with_length(named, length)

    def whole(self, answer: dict[str, Any]) -> bytes:
        """Return a whole answer of the chat route in this protocol's form."""
        return encode(self._writer.whole(answer))

    def error(self, error: dict[str, Any]) -> bytes:
        """Return an error of the chat route in this protocol's form."""
        return encode(self._facade.error(error))

    def begin(self) -> bytes:
        """Return the events before the first text."""
        return _as_events(self._writer.begin())

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """Return the events of a chunk of the chat route's stream; none after an error."""
        if self._has_failed:
            return b""
        self._has_failed = "error" in chunk
        return _as_events((self._writer.failed if self._has_failed else self._writer.take)(chunk))

    def end(self) -> bytes:
        """Return the events after the last chunk; none after an error."""
        return b"" if self._has_failed else _as_events(self._writer.end())


def _as_events(events: Iterable[dict[str, Any]]) -> bytes:
    """Return server-sent events; each has its name as ``type`` too."""
    return b"".join(b"event: " + one["type"].encode() + b"\n" + encode_event(one) for one in events)


class _AnswerReader:
    """Reads a chat answer from the bytes of an application and sends its translation.

    It is what the application is given as ``send``.
    """

    def __init__(self, translation: Translation, send: Any) -> None:
        self._translation = translation
        self._send = send
        self._start: Scope = {}
        self._buffer = b""
        self._is_stream = False

    async def __call__(self, message: Scope) -> None:
        """Take a message of the application."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._is_stream:
            await self._stream(message)
        else:
            await self._whole(message)

    async def _begin(self, message: Scope) -> None:
        headers = message.get("headers", ())
        kind = next((v for k, v in headers if k.lower() == b"content-type"), b"").split(b";")[0]
        self._is_stream = message["status"] == 200 and kind == b"text/event-stream"
        if not self._is_stream:
            self._start = message  # its length is known when the answer is whole
            return
        await self._send({**message, "headers": self._translation.headers(headers)})
        await self._send_events(self._translation.begin(), more=True)

    async def _whole(self, message: Scope) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body"):
            return

        translation = self._translation
        try:
            answer = json.loads(self._buffer)
        except ValueError:  # not of the chat route: a gate's page, or nothing
            content = self._buffer
        else:
            is_answer = self._start["status"] == 200
            content = translation.whole(answer) if is_answer else translation.error(answer)
        headers = translation.headers(self._start.get("headers", ()), len(content))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": content})

    async def _stream(self, message: Scope) -> None:
        *events, self._buffer = (self._buffer + message.get("body", b"")).split(b"\n\n")
        is_last = not message.get("more_body")
        for event in [*events, self._buffer] if is_last else events:
            if event.startswith(
                b"data: {"
            ):  # not [DONE], nor a comment that keeps a connection open
                chunk = json.loads(event.removeprefix(b"data: "))
                await self._send_events(self._translation.chunk(chunk), more=True)
        if is_last:
            await self._send_events(self._translation.end(), more=False)

    async def _send_events(self, content: bytes, *, more: bool) -> None:
        if content or not more:
            await self._send({"type": "http.response.body", "body": content, "more_body": more})


def with_facades(
    app: Any,
    keys: BodyKeys | None,
    *,
    body_limit: int = BODY_LIMIT,
    takes_objects: bool = False,
) -> Any:
    """Return an application with the routes of every protocol; arguments as of :class:`Facade`."""
    for facade in (ResponsesFacade, MessagesFacade):
        app = facade(app, keys, body_limit=body_limit, takes_objects=takes_objects)
    return app


# OpenAI's Responses.

_RESPONSES_WITHOUT_EFFECT = {
    *("user", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("parallel_tool_calls", "max_tool_calls"),
}
_RESPONSES_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "background": (False,),
    "truncation": ("disabled",),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "include": ([], ["reasoning.encrypted_content"]),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "top_logprobs": (0,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "messages": (),
    "n": (1,),
}
"""Keys that are known, and the values that ask for nothing that this server does not do."""


class ResponsesFacade(Facade):
    """``/v1/responses``: text and message items, instructions, reasoning items, events."""

    path = "/v1/responses"
    own = ("input", "instructions", "max_output_tokens", "reasoning", "text", "metadata", "store")
    renamed = frozenset({"messages", "max_tokens", "max_completion_tokens", "n"})

    def to_chat(self, body: dict[str, Any]) -> tuple[dict[str, Any], AnswerWriter, list[str]]:
        """Return the chat request; ``reasoning.effort`` becomes ``reasoning_effort``."""
        body = {key: value for key, value in body.items() if value is not None}
        asked = dict(body)
        for key in _RESPONSES_WITHOUT_EFFECT:
            body.pop(key, None)
        _refuse_unserved(body, _RESPONSES_NEUTRAL)

        chat: dict[str, Any] = {"messages": _messages_of_input(body.pop("input", None))}
        instructions = body.pop("instructions", None)
        if instructions is not None:
            system = {"role": "system", "content": _text(instructions, "instructions")}
            chat["messages"].insert(0, system)

        if "max_output_tokens" in body:
            chat["max_completion_tokens"] = body.pop("max_output_tokens")
        text = _object(body.pop("text", {}), "text")
        form = text.get("format") or {"type": "text"}
        if form != {"type": "text"}:
            chat["response_format"] = _chat_format(form)

        reasoning = _object(body.pop("reasoning", {}), "reasoning")
        if reasoning.get("effort") is not None:
            chat["reasoning_effort"] = reasoning["effort"]
        ignored = _without_effect("reasoning", reasoning, ("effort",))
        ignored += _without_effect("text", text, ("format",))

        metadata = _object(body.pop("metadata", {}), "metadata")
        return chat | body, _ResponseWriter(asked, metadata), ignored


def _messages_of_input(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _bad("input", "a text or a list of at least one item", given)

    messages: list[dict[str, Any]] = []
    thinking = ""
    for place, item in enumerate(given):
        where = f"input[{place}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "reasoning":
            parts = [*(item.get("content") or []), *(item.get("summary") or [])]
            thinking = "".join(str(part.get("text", "")) for part in parts)
            continue
        if kind != "message" or not isinstance(item.get("role"), str):
            raise _bad(where, "a message with a role, or a reasoning item", item)
        message = {"role": item["role"], "content": _content(item.get("content"), where)}
        # A reasoning item is the thinking of the message that follows it.
        if thinking and item["role"] == "assistant":
            message["reasoning_content"] = thinking
        thinking = ""
        messages.append(message)
    if not messages:
        raise _bad("input", "a list with at least one message", given)
    return messages


def _chat_format(form: Any) -> dict[str, Any]:
    """Return ``text.format`` as ``response_format``, where a schema is one level deeper."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {
            "type": "json_schema",
            "json_schema": {k: v for k, v in form.items() if k != "type"},
        }
    return _object(form, "text.format")


class _ResponseWriter(AnswerWriter):
    """Writes a ``response`` object, or its events."""

    def __init__(self, asked: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        reasoning = asked.get("reasoning") or {}
        self._frame: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "metadata": dict(metadata),
            "model": asked.get("model"),
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "store": False,
            "temperature": asked.get("temperature", 1.0),
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None,
        }
        self._output: list[dict[str, Any]] = []
        self._finish: str | None = None
        self._number = 0

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the response."""
        [choice] = answer["choices"]
        message = choice["message"]
        if message.get("reasoning"):
            self._output.append(_reasoning_item(message["reasoning"]))
        self._output.append(_message_item(message.get("content") or ""))
        self._finish = choice["finish_reason"]
        self._note(answer)
        return self._completed()

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield that the response exists."""
        yield self._event("response.created", response=self._frame)
        yield self._event("response.in_progress", response=self._frame)

    def take(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a delta; an item begins with its first text."""
        self._note(chunk)
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta", {})
            for key, kind in (("reasoning", "reasoning"), ("content", "message")):
                if delta.get(key):
                    yield from self._add(kind, delta[key])
            self._finish = choice.get("finish_reason") or self._finish

    def end(self) -> Iterator[dict[str, Any]]:
        """Yield the end of the last item and of the response."""
        if not self._output or self._output[-1]["type"] != "message":
            yield from self._add("message", "")
        yield from self._close()
        response = self._completed()
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield that the response has failed."""
        told = error["error"]
        failure = {"code": told.get("code") or "server_error", "message": told["message"]}
        response = {**self._frame, "status": "failed", "error": failure, "output": self._output}
        yield self._event("response.failed", response=response)

    def _add(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if not self._output or self._output[-1]["type"] != kind:
            yield from self._close()
            item = _reasoning_item("") if kind == "reasoning" else _message_item("")
            item["status"] = "in_progress"
            self._output.append(item)
            bare = {**item, "content": []}
            yield self._event("response.output_item.added", output_index=self._index, item=bare)
            yield self._event(
                "response.content_part.added", part=dict(item["content"][0]), **self._at
            )
        if text:
            self._output[-1]["content"][0]["text"] += text
            more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            yield self._event(f"response.{self._part}.delta", delta=text, **self._at, **more)

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._output or self._output[-1]["status"] == "completed":
            return
        item = self._output[-1]
        part = item["content"][0]
        more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        yield self._event(f"response.{self._part}.done", text=part["text"], **self._at, **more)
        yield self._event("response.content_part.done", part=part, **self._at)
        item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=self._index, item=item)

    @property
    def _index(self) -> int:
        return len(self._output) - 1

    @property
    def _part(self) -> str:
        return str(self._output[-1]["content"][0]["type"])

    @property
    def _at(self) -> dict[str, Any]:
        item = self._output[-1]["id"]
        return {"item_id": item, "output_index": self._index, "content_index": 0}

    def _note(self, answer: dict[str, Any]) -> None:
        """Keep what the answer or the chunk says about the whole."""
        self._frame["model"] = answer.get("model", self._frame["model"])
        if "dial" in answer:
            self._frame["dial"] = answer["dial"]
        if answer.get("usage"):
            self._frame["usage"] = _response_usage(answer["usage"])

    def _completed(self) -> dict[str, Any]:
        is_cut = self._finish == "length"
        ended = "incomplete" if is_cut else "completed"
        details = {"reason": "max_output_tokens"} if is_cut else None
        if is_cut and self._output:
            self._output[-1]["status"] = "incomplete"
        return self._frame | {
            "status": ended,
            "incomplete_details": details,
            "output": self._output,
        }

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return event


def _reasoning_item(text: str) -> dict[str, Any]:
    return {
        "id": f"rs_{uuid.uuid4().hex}",
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
        "encrypted_content": None,
        "status": "completed",
    }


def _message_item(text: str) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
    }


def _response_usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    details = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens") or 0},
        "total_tokens": usage["total_tokens"],
    }


# Anthropic's Messages.

_MESSAGES_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "auto"}, {"type": "none"}),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
    "stream_options": (),
    "n": (1,),
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_ERROR_TYPES = {
    "invalid_request_error": "invalid_request_error",
    "authentication_error": "authentication_error",
    "not_found_error": "not_found_error",
    "rate_limit_error": "rate_limit_error",
}


class MessagesFacade(Facade):
    """``/v1/messages``: text and thinking blocks, ``output_config.effort``, events."""

    path = "/v1/messages"
    own = ("system", "stop_sequences", "output_config", "thinking", "metadata")
    renamed = frozenset({"max_completion_tokens", "stop", "n"})

    def to_chat(self, body: dict[str, Any]) -> tuple[dict[str, Any], AnswerWriter, list[str]]:
        """Return the chat request; ``output_config.effort`` becomes ``reasoning_effort``."""
        body = {key: value for key, value in body.items() if value is not None}
        for key in ("metadata", "service_tier", "inference_geo"):
            body.pop(key, None)
        _refuse_unserved(body, _MESSAGES_NEUTRAL)
        if "max_tokens" not in body:
            raise _bad("max_tokens", "a whole number ≥ 1", None)

        given = body.pop("messages", None)
        if not isinstance(given, list) or not given:
            raise _bad("messages", "a list of at least one message", given)
        chat: dict[str, Any] = {"messages": [_turn(one, n) for n, one in enumerate(given)]}
        system = body.pop("system", None)
        if system is not None:
            chat["messages"].insert(0, {"role": "system", "content": _content(system, "system")})

        if "stop_sequences" in body:
            chat["stop"] = body.pop("stop_sequences")
        config = _object(body.pop("output_config", {}), "output_config")
        if config.get("effort") is not None:
            chat["reasoning_effort"] = config["effort"]
        if config.get("format") is not None:
            form = _object(config["format"], "output_config.format")
            schema = {"name": "answer", "schema": form.get("schema")}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}

        # The thinking is turned by the dial; a budget of tokens is another control.
        ignored = ["thinking"] if body.pop("thinking", None) is not None else []
        ignored += _without_effect("output_config", config, ("effort", "format"))
        return chat | body, _MessageWriter(body.get("model")), ignored

    def error(self, error: dict[str, Any]) -> dict[str, Any]:
        """Return an error in Anthropic's form."""
        told = error.get("error", {})
        kind = _ERROR_TYPES.get(str(told.get("type")), "api_error")
        return {"type": "error", "error": {"type": kind, "message": told.get("message", "")}}


def _turn(given: Any, place: int) -> dict[str, Any]:
    where = f"messages[{place}]"
    if not isinstance(given, dict) or given.get("role") not in ("user", "assistant"):
        raise _bad(where, "an object with the role user or assistant", given)
    content = given.get("content")
    message = {"role": given["role"], "content": _content(content, where)}
    blocks = content if isinstance(content, list) else []
    thinking = "".join(
        str(block.get("thinking", "")) for block in blocks if block.get("type") == "thinking"
    )
    return message | ({"reasoning_content": thinking} if thinking else {})


class _MessageWriter(AnswerWriter):
    """Writes a ``message`` object, or its events."""

    def __init__(self, model: Any) -> None:
        self._frame: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        self._kinds: list[str] = []
        self._is_begun = False

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the message."""
        [choice] = answer["choices"]
        message = choice["message"]
        content = [{"type": "text", "text": message.get("content") or ""}]
        if message.get("reasoning"):
            content.insert(
                0, {"type": "thinking", "thinking": message["reasoning"], "signature": ""}
            )
        self._note(answer)
        return self._frame | {
            "content": content,
            "stop_reason": _STOP_REASONS.get(choice["finish_reason"], "end_turn"),
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield nothing: the first chunk names the model, which the first event has."""
        return iter(())

    def take(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a delta; a block begins with its first text."""
        self._note(chunk)
        if not self._is_begun:
            self._is_begun = True
            yield {"type": "message_start", "message": dict(self._frame)}
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta", {})
            for key, kind in (("reasoning", "thinking"), ("content", "text")):
                if delta.get(key):
                    yield from self._add(kind, delta[key])
            if choice.get("finish_reason"):
                self._frame["stop_reason"] = _STOP_REASONS.get(choice["finish_reason"], "end_turn")

    def end(self) -> Iterator[dict[str, Any]]:
        """Yield the end of the last block and of the message."""
        if not self._kinds or self._kinds[-1] != "text":
            yield from self._add("text", "")
        yield from self._close()
        delta = {"stop_reason": self._frame["stop_reason"], "stop_sequence": None}
        ended: dict[str, Any] = {"type": "message_delta", "delta": delta}
        ended["usage"] = self._frame["usage"]
        yield ended | ({"dial": self._frame["dial"]} if "dial" in self._frame else {})
        yield {"type": "message_stop"}

    def failed(self, error: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the error."""
        yield {
            "type": "error",
            "error": {"type": "api_error", "message": error["error"]["message"]},
        }

    def _add(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if not self._kinds or self._kinds[-1] != kind:
            yield from self._close()
            self._kinds.append(kind)
            block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            yield {"type": "content_block_start", "index": self._index, "content_block": block}
        if text:
            delta = {"type": f"{kind}_delta", kind: text}
            yield {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._kinds:
            yield {"type": "content_block_stop", "index": self._index}

    @property
    def _index(self) -> int:
        return len(self._kinds) - 1

    def _note(self, answer: dict[str, Any]) -> None:
        """Keep what the answer or the chunk says about the whole."""
        self._frame["model"] = answer.get("model", self._frame["model"])
        if "dial" in answer:
            self._frame["dial"] = answer["dial"]
        if usage := answer.get("usage"):
            self._frame["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "output_tokens": usage["completion_tokens"],
            }


# Values of a body.


def _content(given: Any, where: str) -> str:
    """Return the text of a message's content: a text, or a list of parts of text.

    Thinking is not part of it; what is neither, such as a picture, is refused.
    """
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise _bad(f"{where}.content", "a text or a list of parts", given)
    texts = []
    for place, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("thinking", "redacted_thinking"):
            continue
        if kind not in ("text", "input_text", "output_text") or not isinstance(part["text"], str):
            raise _bad(f"{where}.content[{place}]", "a part with a text", part)
        texts.append(part["text"])
    return "".join(texts)


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise _bad(where, "a text", given)
    return given


def _object(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _bad(where, "an object", given)
    return given


def _without_effect(key: str, value: Mapping[str, Any], read: Sequence[str]) -> list[str]:
    """Return the keys of an object in a body that are given and not read."""
    return [f"{key}.{inner}" for inner in value if inner not in read and value[inner]]


def _refuse_unserved(body: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that ask for what is not served; remove those that ask for nothing."""
    for key, served in neutral.items():
        if key not in body:
            continue
        if body[key] not in served:
            raise ApiError(
                400,
                f"{key}: {as_sent(body[key])} is not served by this route, which writes one answer "
                "of text and keeps nothing; leave it out.",
                param=key,
            )
        del body[key]


def _bad(where: str, wanted: str, given: Any) -> ApiError:
    param = where.partition("[")[0].partition(".")[0]
    return ApiError(400, f"{where} must be {wanted}, got {as_sent(given)}.", param=param)


def _with_ignored(
    headers: Iterable[tuple[bytes, bytes]], ignored: Sequence[str]
) -> list[tuple[bytes, bytes]]:
    """Return headers in which keys without effect are named, with those of the chat route."""
    headers = list(headers)
    if not ignored:
        return headers
    name = IGNORED.encode()
    named = [value.decode() for key, value in headers if key.lower() == name]
    kept = [(key, value) for key, value in headers if key.lower() != name]
    return [*kept, (name, ", ".join([*named, ignored_value(ignored)]).encode())]


async def _send_json(
    send: Any, status: int, headers: Sequence[tuple[bytes, bytes]], content: bytes
) -> None:
    start = with_length([(b"content-type", b"application/json"), *headers], len(content))
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": content})
