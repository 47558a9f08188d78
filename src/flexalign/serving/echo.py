"""An answer on its way to the client, with the dial written into it."""

import json
from typing import Any

from flexalign.serving.bodies import with_length
from flexalign.serving.dial import Choice
from flexalign.serving.errors import Scope

__all__ = ["Echo"]


class Echo:
    """Sends an answer on and says in it what its dial was.

    That stands in the object, or, in a stream, in the first chunk and every chunk that ends
    something. It is what an application is given as ``send``.
    """

    def __init__(self, choice: Choice, send: Any) -> None:
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

    def tell(self, answer: Any) -> Any:
        """Return a whole answer as the client gets it."""
        return self._told(answer)

    def tell_chunk(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """Return a chunk of a stream as the client gets it; None for nothing."""
        choices = chunk.get("choices")
        ends = not choices or any(choice.get("finish_reason") for choice in choices)
        if "error" in chunk or not (self._is_first or ends):
            return chunk
        self._is_first = False
        told: dict[str, Any] = self._told(chunk)
        return told

    async def _begin(self, message: Scope) -> None:
        headers = list(message.get("headers", ()))
        if self.choice.ignored:
            names = ", ".join(self.choice.ignored)
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
        body = _encoded(self.tell(json.loads(self._buffer)))
        headers = with_length(self._start["headers"], len(body))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _stream(self, message: Scope) -> None:
        *events, self._buffer = (self._buffer + message.get("body", b"")).split(b"\n\n")
        if self._buffer and not message.get("more_body"):
            events, self._buffer = [*events, self._buffer], b""
        told = [one for one in map(self._event, events) if one is not None]
        content = b"\n\n".join([*told, b""] if told else [])
        if content.strip() or not message.get("more_body"):
            await self._send({**message, "body": content if content.strip() else b""})

    def _event(self, event: bytes) -> bytes | None:
        if not event.startswith(b"data: {"):
            return event
        chunk = self.tell_chunk(json.loads(event[len(b"data: ") :]))
        return None if chunk is None else b"data: " + _encoded(chunk)

    def _told(self, value: Any) -> Any:
        if isinstance(value, dict) and self.choice.report:
            value["dial"] = self.choice.report
        return value


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
