"""What vLLM refuses, in OpenAI's form: its own differs in places that clients read."""

import json
from typing import Any

from flexalign.serving.bodies import with_length
from flexalign.serving.errors import ApiError, Scope

__all__ = ["openai_errors"]

_QUEUE_IS_FULL = ("cannot accept new requests", "backlog limit")
"""What vLLM 0.32 says, with a 503, when ``--max-num-queued-reqs`` or ``-tokens`` is reached."""


def openai_errors(app: Any) -> Any:
    """Return vLLM's application with its errors as a client of OpenAI's expects them.

    An unknown route's ``{"detail": …}`` becomes an ``error``; the type is a word of OpenAI's, and
    the code no number; a full queue is a 429 that says when to come back.
    """

    async def telling(scope: Scope, receive: Any, send: Any) -> None:
        await app(scope, receive, _Errors(send) if scope["type"] == "http" else send)

    return telling


class _Errors:
    """A client's ``send``, which holds an error back until it is whole."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._start: Scope | None = None
        self._body = b""

    async def __call__(self, message: Scope) -> None:
        if message["type"] == "http.response.start" and _is_error(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._end(self._start)

    async def _end(self, start: Scope) -> None:
        error = _retold(start["status"], self._body)
        body, headers = self._body, list(start["headers"])
        if error is not None:
            body = json.dumps(error.to_json(), ensure_ascii=False).encode()
            headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
            start = {**start, "status": error.status}
        await self._send({**start, "headers": with_length(headers, len(body))})
        await self._send({"type": "http.response.body", "body": body})


def _is_error(message: Scope) -> bool:
    kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return message["status"] >= 400 and any(b"application/json" in kind for kind in kinds)


def _retold(status: int, body: bytes) -> ApiError | None:
    """Return an error of vLLM's as ours; None for one that is ours already, or that is unknown."""
    try:
        told = json.loads(body)
    except ValueError:
        return None
    if not isinstance(told, dict):
        return None
    if isinstance(told.get("detail"), str):
        return ApiError(status, told["detail"])
    error = told.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        return None
    message = str(error.get("message"))
    if status == 503 and any(words in message for words in _QUEUE_IS_FULL):
        return ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
    param = error.get("param")
    return ApiError(status, message, param=param if isinstance(param, str) else None)
