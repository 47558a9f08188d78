"""A page to try a server: a chat with the dial, and several settings side by side.

:class:`Playground` is ASGI middleware and does not depend on an engine: the page calls ``/v1/models``
and ``/v1/chat/completions`` of the application that it wraps, ours or vLLM's.
"""

from importlib.resources import files
from typing import Any

from flexalign.serving.errors import Scope

__all__ = ["Playground"]

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
_REDIRECTS = {"/": "playground", "/playground/": "../playground"}
"""Relative, so that they also work behind a proxy that adds a prefix to the paths."""


class Playground:
    """Serves the page at ``/playground``, redirects ``/`` to it, and passes other requests on."""

    def __init__(self, app: Any) -> None:
        """Wrap an application, its key check included: the page itself needs no key."""
        self._app = app
        self._files = _read_page()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        is_asked = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        path = scope["path"].removeprefix(scope.get("root_path", "")) if is_asked else None
        if path in _REDIRECTS:
            await _send(send, 307, ((b"location", _REDIRECTS[path].encode()),), b"")
        elif path in self._files:
            kind, content = self._files[path]
            await _send(send, 200, ((b"content-type", kind),), content)
        else:
            await self._app(scope, receive, send)


def _read_page() -> dict[str, tuple[bytes, bytes]]:
    """Return the type and content of every file, by its URL path."""
    served = {}
    for file in (files(__package__) / "page").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/playground" if file.name == "index.html" else f"/playground/{file.name}"
            served[path] = (f"{kind}; charset=utf-8".encode(), file.read_bytes())
    return served


async def _send(
    send: Any, status: int, headers: tuple[tuple[bytes, bytes], ...], content: bytes
) -> None:
    length = (b"content-length", str(len(content)).encode())
    headers = (*headers, length, *_HEADERS)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
