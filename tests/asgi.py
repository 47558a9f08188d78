"""One request to an application in this process, without a socket."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

Body = dict[str, Any] | bytes | Sequence[bytes]


def request(app: Any, path: str, body: Body = b"", **how: Any) -> list[Any]:
    """Send a request and return the messages that came back; ``how`` is as in `exchange`."""
    return asyncio.run(exchange(app, path, body, **how))


async def exchange(
    app: Any,
    path: str,
    body: Body = b"",
    *,
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
    root_path: str = "",
    leaves_after: int | None = None,
    sent: list[Any] | None = None,
) -> list[Any]:
    """Send a request and return the messages that came back.

    Args:
        app: The application.
        path: Of the request.
        body: An object, which is sent as JSON, bytes, or the parts in which they come.
        method: Of the request.
        headers: Before the one that says that the body is JSON.
        root_path: Of the server.
        leaves_after: Messages of the answer after which the client leaves; 0 is at its body's end.
        sent: Where the messages go, for who wants them of an application that fails after its answer.
    """
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    left = [body] if isinstance(body, bytes) else list(body)
    messages = [] if sent is None else sent
    gone = asyncio.Event()
    if leaves_after == 0:
        gone.set()

    async def receive() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)
        if len(messages) == leaves_after:
            gone.set()

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [*headers, (b"content-type", b"application/json")],
        "query_string": b"",
        "root_path": root_path,
    }
    await app(scope, receive, send)
    return messages


def read(messages: Sequence[Any]) -> tuple[int, bytes]:
    """Return the status and the content of an answer."""
    return messages[0]["status"], b"".join(one.get("body", b"") for one in messages[1:])
