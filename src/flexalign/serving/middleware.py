"""ASGI middleware: the dial in front of any engine, the key, and the limit on a body.

:class:`DialMiddleware` stands before an application of OpenAI's protocol, ours or vLLM's. It takes
the dial out of a request's body, hands it over, and writes what became of it into the answer: into
the object, or, in a stream, into the first chunk and every chunk that ends something.
"""

import hmac
import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from flexalign.serving.dial import Choice, DialRules
from flexalign.serving.errors import ApiError, Scope, send_error

__all__ = ["CHOICE", "PATHS", "DialMiddleware", "KeyGate"]

CHOICE = "flexalign.dial"
"""Under this name a request's scope holds its :class:`~flexalign.serving.dial.Choice`."""

PATHS = ("/v1/chat/completions", "/v1/completions")
"""Where a dial may be turned."""

_DEEPEST = 64

_HEARD_OUT = 16
"""Bodies of up to so many times the limit are read to their end before they are refused."""

Carry = Callable[[dict[str, Any], Choice], None]
"""Writes a choice into the body, for an engine that cannot read the scope."""


class DialMiddleware:
    """Reads the dial of every request and says in the answer what it was."""

    def __init__(
        self, app: Any, rules: DialRules, *, body_limit: int = 4 << 20, carry: Carry | None = None
    ) -> None:
        """Stand before an application.

        Args:
            app: An ASGI application.
            rules: What is permitted.
            body_limit: The longest body in bytes.
            carry: How the choice gets to an engine that cannot read the scope.
        """
        self._app = app
        self._rules = rules
        self._limit = body_limit
        self._carry = carry

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["path"].rstrip("/") not in PATHS
        ):
            await self._app(scope, receive, send)
            return
        try:
            content = await _read(scope, receive, self._limit)
            if content is None:
                return
            body = _parse(content)
            choice = self._rules.choose(body)
        except ApiError as error:
            await send_error(error, send)
            return
        if self._carry is not None:
            self._carry(body, choice)
        content = json.dumps(body).encode()
        scope = {**scope, "headers": _with_length(scope["headers"], len(content)), CHOICE: choice}
        await self._app(scope, _replayed(content, receive), _Echo(choice, send))


class KeyGate:
    """Lets requests under ``/v1`` in that carry the right key."""

    def __init__(self, app: Any, key: str) -> None:
        """Stand before an application; the comparison takes the same time for every wrong key."""
        self._app = app
        self._digest = sha256(f"Bearer {key}".encode()).digest()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = b"".join(v for name, v in scope["headers"] if name == b"authorization")
            if not hmac.compare_digest(sha256(given).digest(), self._digest):
                error = ApiError(
                    401,
                    "the key is missing or wrong; send Authorization: Bearer and the server's key.",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await send_error(error, send)
                return
        await self._app(scope, receive, send)


class _Echo:
    """Sends an answer on, with the dial written into it."""

    def __init__(self, choice: Choice, send: Any) -> None:
        self._choice = choice
        self._send = send
        self._kind = ""
        self._start: Scope = {}
        self._buffer = b""
        self._is_first = True

    async def __call__(self, message: Scope) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body" or not self._kind:
            await self._send(message)
        elif self._kind == "application/json":
            await self._whole(message)
        else:
            await self._stream(message)

    async def _begin(self, message: Scope) -> None:
        headers = list(message.get("headers", ()))
        if self._choice.ignored:
            names = ", ".join(self._choice.ignored)
            headers.append((b"x-flexalign-ignored", names.encode()))
        kind = next((v for k, v in headers if k.lower() == b"content-type"), b"").split(b";")[0]
        message = {**message, "headers": headers}
        if message["status"] == 200 and kind in (b"application/json", b"text/event-stream"):
            self._kind = kind.decode()
        if self._kind == "application/json":
            self._start = message
        else:
            await self._send(message)

    async def _whole(self, message: Scope) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body"):
            return
        body = self._told(json.loads(self._buffer))
        headers = _with_length(self._start["headers"], len(body))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Scope) -> None:
        *events, self._buffer = (self._buffer + message.get("body", b"")).split(b"\n\n")
        if not message.get("more_body"):
            events, self._buffer = [*events, self._buffer], b""
        content = b"\n\n".join([*map(self._event, events), b""] if events else [])
        if content.strip() or not message.get("more_body"):
            await self._send({**message, "body": content if content.strip() else b""})

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        chunk = json.loads(event[len(b"data: ") :])
        choices = chunk.get("choices")
        ends = not choices or any(choice.get("finish_reason") for choice in choices)
        if "error" in chunk or not (self._is_first or ends):
            return event
        self._is_first = False
        return b"data: " + self._told(chunk)

    def _told(self, value: Any) -> bytes:
        if isinstance(value, dict) and self._choice.report:
            value["dial"] = self._choice.report
        return json.dumps(value, ensure_ascii=False).encode()


async def _read(scope: Scope, receive: Any, limit: int) -> bytes | None:
    """Return a request's body; None if the client has gone.

    What is over the limit is read on and thrown away, up to a point: a client that is cut off in
    the middle of its writing sees a broken connection instead of the reason.
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


def _parse(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"the body is no JSON ({str(error)[:200]}); send an object.", code="invalid_json"
        ) from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object.", code="invalid_json")
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


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """Return headers that announce a body's length."""
    dropped = (b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [*kept, (b"content-length", str(length).encode())]


def _replayed(content: bytes, receive: Any) -> Any:
    """Return a ``receive`` that gives a body that was read before, then goes on."""
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def again() -> Any:
        return parts.pop() if parts else await receive()

    return again
