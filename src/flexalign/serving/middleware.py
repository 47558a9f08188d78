"""ASGI middleware: the dial in front of any engine, the key, and the limit on a body.

:class:`DialMiddleware` stands before an application of OpenAI's protocol, ours or vLLM's. It takes
the dial out of a request's body, hands it over, and lets :class:`~flexalign.serving.echo.Echo` write
what became of it into the answer.
"""

import hmac
from hashlib import sha256
from typing import Any

from flexalign.serving.bodies import BODY_LIMIT, parse_body, read_body, with_body
from flexalign.serving.dial import Choice, DialRules
from flexalign.serving.echo import Echo
from flexalign.serving.errors import ApiError, Scope, send_error

__all__ = ["CHOICE", "PATHS", "DialMiddleware", "KeyGate", "path_of"]

CHOICE = "flexalign.dial"
"""Under this name a request's scope holds its :class:`~flexalign.serving.dial.Choice`."""

PATHS = ("/v1/chat/completions", "/v1/completions")
"""Where a dial may be turned."""


class DialMiddleware:
    """Reads the dial of every request and says in the answer what it was.

    The engine finds the choice in the scope; what stands before an engine that cannot read it
    overrides :meth:`pass_on`.
    """

    def __init__(self, app: Any, rules: DialRules, *, body_limit: int = BODY_LIMIT) -> None:
        """Stand before an application.

        Args:
            app: An ASGI application.
            rules: What is permitted.
            body_limit: The longest body in bytes.
        """
        self.app = app
        self.rules = rules
        self.body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        is_asked = scope["type"] == "http" and scope["method"] == "POST"
        if not is_asked or path_of(scope) not in PATHS:
            await self.app(scope, receive, send)
            return
        try:
            content = await read_body(scope, receive, self.body_limit)
            if content is None:
                return
            _require_json(scope)
            body = parse_body(content)
            choice = self.rules.choose(body)
            await self.pass_on(body, choice, scope, receive, send)
        except ApiError as error:
            await send_error(error, send)

    async def pass_on(
        self, body: dict[str, Any], choice: Choice, scope: Scope, receive: Any, send: Any
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
        await self.app(scope, receive, Echo(choice, send))


def _require_json(scope: Scope) -> None:
    """Refuse a body that is not said to be JSON: such a one any site's page may send unasked.

    Raises:
        ApiError: If it is not.
    """
    given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"content-type"), "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"the body is said to be {given[:80] or 'of no type'}; say that it is JSON, with curl by "
            "-H 'content-type: application/json'.",
            code="invalid_content_type",
        )


class KeyGate:
    """Lets those requests under ``/v1``, and those that post anything, in that carry the right key."""

    def __init__(self, app: Any, key: str) -> None:
        """Stand before an application; the comparison takes the same time for every wrong key."""
        self._app = app
        self._digest = sha256(f"Bearer {key}".encode()).digest()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        is_http = scope["type"] == "http"
        if is_http and (scope["method"] == "POST" or path_of(scope).startswith("/v1")):
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


def path_of(scope: Scope) -> str:
    """Return the path that a request asks for, whatever the server's root path."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/")
