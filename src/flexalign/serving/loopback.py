"""A server without a key serves this machine: its programs, and pages that came from it."""

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from flexalign.serving.errors import ApiError, Scope, send_error

__all__ = ["LoopbackGate", "is_loopback"]


class LoopbackGate:
    """Refuses what a page of another site makes a browser on this machine send.

    Listening on the loopback keeps other machines out, and not the pages that a browser here has
    open: a site's name may be pointed at 127.0.0.1 (DNS rebinding), which its ``Host`` shows, and
    any page may send to ``http://localhost``, which its ``Origin`` shows.
    """

    def __init__(self, app: Any) -> None:
        """Stand before an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request. One without the two headers comes from no browser."""
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            for header, before in ((b"host", "//"), (b"origin", "")):
                given = headers.get(header)
                if given is not None and not is_loopback(_name_in(before + given)):
                    await send_error(_refused(header.decode(), given), send)
                    return
        await self._app(scope, receive, send)


def is_loopback(name: str) -> bool:
    """Whether a name or an address is this machine's own: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _name_in(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _refused(header: str, given: str) -> ApiError:
    return ApiError(
        403,
        f"the {header} is {given[:80]}, and this server has no key and serves this machine alone, by "
        "localhost or 127.0.0.1; ask there, or start it with --api-key-env or --insecure.",
        code="not_local",
    )
