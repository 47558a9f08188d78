"""Bodies of requests: read up to a limit, taken for JSON, and put back changed."""

import json
from typing import Any

from flexalign.serving.errors import ApiError, Scope, as_sent

__all__ = ["BODY_LIMIT", "parse_body", "read_body", "with_body", "with_length"]

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
