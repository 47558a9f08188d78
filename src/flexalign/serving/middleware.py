"""ASGI middleware: the dial in front of an engine that is not ours, and the gates before any server.

:class:`DialMiddleware` stands before vLLM's application of OpenAI's protocol, which it knows as bytes
alone: it takes the dial out of a request's body, hands it over, and lets a :class:`DialWriter` write what
became of it into the answer. The local server's routes read the dial themselves. :class:`KeyGate` and
:class:`LoopbackGate` say who is served, and :class:`RequestIds` names each answer; they stand before
either.
"""

import hmac
import ipaddress
import json
import uuid
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from flexalign.serving.dial import DialChoice, DialRules
from flexalign.serving.errors import ApiError, Scope, send_error
from flexalign.serving.keys import IGNORED, BodyKeys, ignored_value
from flexalign.serving.protocol import BODY_LIMIT, encode, read_json

CHOICE = "flexalign.dial"
"""Under this name a request's scope holds its :class:`~flexalign.serving.dial.DialChoice`."""

PATHS = ("/v1/chat/completions", "/v1/completions")
"""Where a dial may be turned."""


class DialMiddleware:
    """Reads the dial of every request and says in the answer what it was.

    The engine finds the choice in the scope; what stands before an engine that cannot read it
    overrides :meth:`pass_on`.
    """

    def __init__(
        self,
        app: Any,
        rules: DialRules,
        keys: Mapping[str, BodyKeys] | None = None,
        *,
        body_limit: int = BODY_LIMIT,
    ) -> None:
        """Stand before an application.

        Args:
            app: An ASGI application.
            rules: What is permitted.
            keys: The keys that bodies may have, by path; others are not judged.
            body_limit: The longest body in bytes.
        """
        self.app = app
        self.rules = rules
        self.keys = keys or {}
        self.body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        is_asked = scope["type"] == "http" and scope["method"] == "POST"
        if not is_asked or path_of(scope) not in PATHS:
            await self.app(scope, receive, send)
            return
        try:
            body = await read_json(scope, receive, self.body_limit)
            if body is None:  # the client has gone
                return
            choice = self.rules.choose(body)
            keys = self.keys.get(path_of(scope))
            choice.ignored += () if keys is None else keys.sort_out(body)
            await self.pass_on(body, choice, scope, receive, send)
        except ApiError as error:
            await send_error(error, send)

    async def pass_on(
        self, body: dict[str, Any], choice: DialChoice, scope: Scope, receive: Any, send: Any
    ) -> None:
        """Let the application answer.

        Args:
            body: The request's, without the keys that say a dial.
            choice: What they said.
            scope: The request's, as are ``receive``, whose body has been read, and ``send``.

        Raises:
            ApiError: If it is refused, before anything is sent.
        """
        scope, receive = with_body({**scope, CHOICE: choice}, body, receive)
        await self.app(scope, receive, DialWriter(choice, send))


class DialWriter:
    """Sends an answer on and says in it what its dial was.

    That stands in the object, or, in a stream, in the first chunk and every chunk that ends
    something. It is what an application is given as ``send``.
    """

    def __init__(self, choice: DialChoice, send: Any) -> None:
        """Stand before a client.

        Args:
            choice: What the request said; what an engine adds to its report before the first part
                of the answer is told too.
            send: The client's.
        """
        self.choice = choice
        self._send = send
        self._kind = ""
        self._start: Scope = {}
        self._buffer = b""
        self._is_first = True

    async def __call__(self, message: Scope) -> None:
        """Send a message of the application."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body" or not self._kind:
            await self._send(message)
        elif self._kind == "application/json":
            await self._whole(message)
        else:
            await self._stream(message)

    def rewrite(self, answer: Any) -> Any:
        """Return a whole answer as the client gets it."""
        return self._with_dial(answer)

    def rewrite_chunk(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """Return a chunk of a stream as the client gets it; None for nothing."""
        choices = chunk.get("choices")
        ends = not choices or any(choice.get("finish_reason") for choice in choices)
        if "error" in chunk or not (self._is_first or ends):
            return chunk
        self._is_first = False
        rewritten: dict[str, Any] = self._with_dial(chunk)
        return rewritten

    async def _begin(self, message: Scope) -> None:
        """Send the start of an answer, or keep it; see what kind of answer it is."""
        headers = list(message.get("headers", ()))
        if self.choice.ignored:
            headers.append((IGNORED.encode(), ignored_value(self.choice.ignored).encode()))

        kind = next((v for k, v in headers if k.lower() == b"content-type"), b"").split(b";")[0]
        message = {**message, "headers": headers}
        if message["status"] == 200 and kind in (b"application/json", b"text/event-stream"):
            self._kind = kind.decode()

        if self._kind == "application/json":
            self._start = message  # its length is known when the answer is whole
        else:
            await self._send(message)

    async def _whole(self, message: Scope) -> None:
        """Keep the parts of a whole answer; send them, rewritten, after the last."""
        self._buffer += message.get("body", b"")
        if message.get("more_body"):
            return

        body = encode(self.rewrite(json.loads(self._buffer)))
        headers = with_length(self._start["headers"], len(body))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Scope) -> None:
        """Send the events of a stream that are whole, rewritten; keep the rest."""
        *events, self._buffer = (self._buffer + message.get("body", b"")).split(b"\n\n")
        if self._buffer and not message.get("more_body"):
            events, self._buffer = [*events, self._buffer], b""

        rewritten = [one for one in map(self._event, events) if one is not None]
        content = b"\n\n".join([*rewritten, b""] if rewritten else [])
        if content.strip() or not message.get("more_body"):
            await self._send({**message, "body": content if content.strip() else b""})

    def _event(self, event: bytes) -> bytes | None:
        if not event.startswith(b"data: {"):
            return event
        chunk = self.rewrite_chunk(json.loads(event[len(b"data: ") :]))
        return None if chunk is None else b"data: " + encode(chunk)

    def _with_dial(self, value: Any) -> Any:
        """Write the dial into an object, unless the model has none."""
        if isinstance(value, dict) and self.choice.report:
            value["dial"] = self.choice.report
        return value


def with_body(scope: Scope, content: bytes | dict[str, Any], receive: Any) -> tuple[Scope, Any]:
    """Return a scope and a ``receive`` as if the request's body, which was read, were this one."""
    if isinstance(content, dict):
        content = json.dumps(content).encode()  # in ASCII, which every engine reads
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def replayed() -> Any:
        return parts.pop() if parts else await receive()

    return {**scope, "headers": with_length(scope["headers"], len(content))}, replayed


def with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """Return headers that announce a body's length."""
    dropped = (b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [*kept, (b"content-length", str(length).encode())]


def path_of(scope: Scope) -> str:
    """Return the path that a request asks for, whatever the server's root path."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/")


_REQUEST_ID = b"x-request-id"
_ID_LENGTH = 128


class RequestIds:
    """Gives every answer the header ``x-request-id``: the client's own, or a new one.

    A client's is echoed if it has at most 128 printable ASCII characters, so that it cannot break
    a header or a log.
    """

    def __init__(self, app: Any) -> None:
        """Stand before an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
        is_safe = 0 < len(given) <= _ID_LENGTH and all(33 <= letter <= 126 for letter in given)
        own = given if is_safe else f"req_{uuid.uuid4().hex}".encode()

        async def send_with_id(message: Scope) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message.get("headers", ()) if pair[0] != _REQUEST_ID]
                message = {**message, "headers": [*headers, (_REQUEST_ID, own)]}
            await send(message)

        await self._app(scope, receive, send_with_id)


class KeyGate:
    """Lets those requests under ``/v1``, and those that post anything, in that carry the right key.

    It is a bearer token, or the header ``x-api-key``, which clients of Anthropic's protocol send.
    """

    def __init__(self, app: Any, key: str) -> None:
        """Stand before an application; the comparison takes the same time for every wrong key."""
        self._app = app
        self._digest = sha256(f"Bearer {key}".encode()).digest()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        is_http = scope["type"] == "http"
        if is_http and (scope["method"] == "POST" or path_of(scope).startswith("/v1")):
            sent = dict(scope["headers"])
            given = sent.get(b"authorization", b"Bearer " + sent.get(b"x-api-key", b""))
            if not hmac.compare_digest(sha256(given).digest(), self._digest):
                error = ApiError(
                    401,
                    "the key is missing or wrong; send Authorization: Bearer and the server's key.",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await send_error(error, send)
                return
            if b"authorization" not in sent:  # vLLM compares the key again
                scope = {**scope, "headers": [*scope["headers"], (b"authorization", given)]}
        await self._app(scope, receive, send)


class LoopbackGate:
    """Refuses what a page of another site makes a browser on this machine send.

    Listening on the loopback keeps other machines out, and not the pages that a browser here has
    open: a site's name may be pointed at 127.0.0.1 (DNS rebinding), which its ``Host`` shows, and
    any page may send to ``http://localhost``, which its ``Origin`` shows.
    """

    def __init__(self, app: Any) -> None:
        """Stand before an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request. One without the two headers comes from no browser."""
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            for header, before in ((b"host", "//"), (b"origin", "")):
                given = headers.get(header)
                if given is not None and not is_loopback(_name_in(before + given)):
                    await send_error(_refused(header.decode(), given), send)
                    return
        await self._app(scope, receive, send)


def is_loopback(name: str) -> bool:
    """Whether a name or an address is this machine's own: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _name_in(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _refused(header: str, given: str) -> ApiError:
    return ApiError(
        403,
        f"the {header} is {given[:80]}, and this server has no key and serves this machine alone, by "
        "localhost or 127.0.0.1; ask there, or start it with --api-key-env or --insecure.",
        code="not_local",
    )
