"""What a server answers when it cannot do what it was asked, in OpenAI's form."""

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
"""What ASGI calls so, and its messages."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200.

    It is no part of the library's tree: nothing but the server raises or catches it.

    Attributes:
        status: The HTTP status.
        message: What is wrong and what to do.
        param: The key of the body that is wrong, if one is.
        code: A word for programs.
        headers: More headers of the answer.
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
        """Return the body."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def as_sent(value: object) -> str:
    """Return a value of a body as JSON, for messages: what is longer than 80 characters is cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


async def send_error(error: ApiError, send: Any) -> None:
    """Answer a request with an error, from a place where there is no application yet."""
    body = json.dumps(error.to_json(), ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
