"""The address of a server: its socket and the URL of its API. Free of what a server is built on."""

import os
import socket

from flexalign.errors import ServingError


def open_socket(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 takes a free port.

    Raises:
        ServingError: If the address is in use or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ServingError(
            f"{host}, port {port}: {reason}; choose another --host or --port (--port 0 takes a free one)."
        ) from error


def url_of(host: str, port: int, *, scheme: str = "http") -> str:
    """Return the URL of a server's API."""
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}/v1"
