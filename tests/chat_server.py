"""A server of OpenAI's protocol on the loopback, for tests: it answers, or fails, as it is told."""

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Answer = Callable[[str, dict[str, Any]], Any]
"""What to answer to a path and a body: (status, JSON or bytes[, headers]), or `CLOSE`."""

CLOSE = None
"""Close the connection without a word."""


class Half(NamedTuple):
    """Announce the whole of a value and close in the middle of it."""

    value: Any


def say(content: Any, finish: str = "stop", **message: Any) -> tuple[int, Any]:
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 5}}


class Chat:
    """The server, and what it was asked: (path, body, Authorization)."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.most_at_once = 0
        self._running = 0
        lock, chat = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def do_GET(self) -> None:
                self._reply({})

            def _reply(self, body: dict[str, Any]) -> None:
                with lock:
                    chat._running += 1
                    chat.most_at_once = max(chat.most_at_once, chat._running)
                    chat.asked.append((self.path, body, self.headers.get("Authorization")))
                try:
                    told = answer(self.path, body)
                finally:
                    with lock:
                        chat._running -= 1
                if told is not CLOSE:
                    self._send(*told)
                self.close_connection = True

            def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
                half = isinstance(value, Half)
                whole = value.value if half else value
                content = whole if isinstance(whole, bytes) else json.dumps(whole).encode()
                self.send_response(status)
                for name, text in (headers or {}).items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have stopped waiting
                    self.wfile.write(content[: len(content) // 2] if half else content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
