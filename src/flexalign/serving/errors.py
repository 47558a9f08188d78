"""Error answers of a server, in OpenAI's format."""

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
"""The scope of an ASGI request; ASGI messages have the same type."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200.

    It is not a `FlexAlignError`: only the server raises and catches it.

    Attributes:
        status: The HTTP status.
        message: What is wrong and what to do.
        param: The key of the body that is wrong; None if it is not a key.
        code: A short name of the error, for programs.
        headers: Additional headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def as_sent(value: object) -> str:
    """Return a value of a body as JSON for messages, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


async def send_error(error: ApiError, send: Any) -> None:
    """Answer a request with an error, from ASGI middleware outside the application."""
    body = json.dumps(error.to_json(), ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
