"""One request to an application in this process, without a socket."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any


def request(
    app: Any,
    path: str,
    body: dict[str, Any],
    *,
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
    sent: list[Any] | None = None,
) -> list[Any]:
    """Send a JSON body and return the messages that came back.

    Args:
        app: The application.
        path: Of the request.
        body: Of the request.
        method: Of the request.
        headers: Beside the one that says that the body is JSON.
        sent: Where the messages go, for who wants them of an application that fails after its answer.
    """
    messages = [] if sent is None else sent
    parts = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Any:
        if not parts:
            await asyncio.Event().wait()
        return parts.pop()

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [*headers, (b"content-type", b"application/json")],
        "query_string": b"",
        "root_path": "",
    }
    asyncio.run(app(scope, receive, send))
    return messages
