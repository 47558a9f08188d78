"""The server's process: its socket, its signals, its end."""

import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from flexalign.errors import ConfigError, ServingError
from flexalign.serving.loopback import is_loopback

__all__ = ["open_socket", "require_safe_address", "run_server"]


def require_safe_address(host: str, key: str | None, *, insecure: bool) -> None:
    """Refuse to let the network in without a key.

    Raises:
        ConfigError: If the address is not this machine's own, there is no key, and nobody said
            that this is meant.
    """
    if not is_loopback(host) and key is None and not insecure:
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no key; name the environment "
            "variable that holds one with --api-key-env, or say --insecure."
        )


def open_socket(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 takes a free one.

    Raises:
        ServingError: If the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ServingError(
            f"{host}, port {port}: {reason}; choose another --host or --port (--port 0 takes a free one)."
        ) from error


def run_server(
    app: Any, listening: socket.socket, *, grace: float, is_well: Callable[[], bool]
) -> None:
    """Serve until SIGTERM or Ctrl-C; then take nothing new and let what runs finish.

    Args:
        app: The ASGI application.
        listening: Of :func:`open_socket`.
        grace: Seconds that running answers have.
        is_well: Whether the engine runs. Once it does not, the server ends as well, so that
            whatever looks after the process starts it again.

    Raises:
        ServingError: If the engine has failed.
    """
    logging.getLogger("flexalign").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    # uvicorn raises the signal once more when it is done; a clean end is no failure.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, is_well).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
    if not is_well():
        raise ServingError("the engine has failed; the log above says why. Start the server again.")


class _Server(uvicorn.Server):
    """Ends by itself when the engine has."""

    def __init__(self, config: uvicorn.Config, is_well: Callable[[], bool]) -> None:
        super().__init__(config)
        self._is_well = is_well

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether the server ends."""
        return not self._is_well() or await super().on_tick(counter)
