"""A server of OpenAI's protocol that streams what it is told to, behind the real middleware."""

import json
import threading
from typing import Any

import uvicorn

from flexalign.serving.address import open_socket
from flexalign.serving.dial import DialRules
from flexalign.serving.middleware import CHOICE, DialMiddleware
from flexalign.serving.playground import Playground


class StreamingServer:
    """The server, what it was asked, and whether a client has left it in the middle.

    Attributes:
        deltas: What an answer's chunks hold.
        failure: What a stream says in the place of its end.
        stalls: Whether a stream waits for its client to leave.
        breaks: Whether the connection closes in the middle of a stream.
    """

    def __init__(self, rules: DialRules) -> None:
        self.deltas: list[dict[str, Any]] = [{"content": "Yes."}]
        self.failure: dict[str, Any] | None = None
        self.stalls = False
        self.breaks = False
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self._has_dial = rules.default is not None
        self._effort = rules.effort is not None
        app: Any = DialMiddleware(self, rules)
        listening = open_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(Playground(app), log_level="critical", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            dial = {"default": {"policy": "fixed", "lambda": 0}, "lambda_range": [-0.5, 2]}
            model = {"id": "M <b>1</b>"}
            model |= {"dial": dial | {"effort": self._effort}} if self._has_dial else {}
            return await self._whole(send, 200, {"data": [model]})
        if scope["path"] != "/v1/chat/completions":
            return await self._whole(send, 404, {"error": {"message": "nothing here."}})
        asked = json.loads((await receive())["body"])
        self.asked.append(asked | scope[CHOICE].report)
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        for delta in self.deltas:
            await self._event(send, {"choices": [{"index": 0, "delta": delta}]})
        if self.stalls:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
            return None
        if self.breaks:
            return None
        if self.failure:
            await self._event(send, self.failure)
        ended = {"index": 0, "delta": {}, "finish_reason": "length"}
        await self._event(send, {"choices": [ended]})
        details = {"reasoning_tokens": 5}
        usage = {"completion_tokens": 1234, "completion_tokens_details": details}
        await self._event(send, {"choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return None

    async def _event(self, send: Any, value: Any) -> None:
        body = f"data: {json.dumps(value)}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _whole(self, send: Any, status: int, value: Any) -> None:
        kind = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": kind})
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})
