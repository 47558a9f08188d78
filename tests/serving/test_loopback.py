"""A server on the loopback without a key, and the pages that a browser has open."""

import json
from typing import Any

import pytest

from asgi import read, request
from flexalign.serving.middleware import LoopbackGate


def ask(**headers: str) -> tuple[int, dict[str, Any]]:
    """Ask for something, with these headers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    status, content = read(request(LoopbackGate(app), "/v1/models", headers=encoded))
    return status, json.loads(content)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.8.8", "[::1]:8000", "[::1]"]
)
def test_this_machine_is_served(host: str):
    assert ask(host=host) == (200, {})
    assert ask(host=host, origin=f"http://{host}") == (200, {})


@pytest.mark.parametrize(
    "host",
    [
        "rebound.example:8000",
        "127.0.0.1.rebound.example",
        "localhost.rebound.example",
        "rebound.example@localhost.rebound.example",
        "0.0.0.0:8000",
        "10.0.0.1",
        "[::",
        "",
    ],
)
def test_another_name_is_refused(host: str):
    status, body = ask(host=host)
    assert (status, body["error"]["code"]) == (403, "not_local")
    assert "--api-key-env or --insecure" in body["error"]["message"]


@pytest.mark.parametrize(
    "origin", ["https://site.example", "null", "http://localhost.site.example"]
)
def test_another_sites_page_is_refused(origin: str):
    status, body = ask(host="localhost:8000", origin=origin)
    assert (status, body["error"]["type"]) == (403, "invalid_request_error")
    assert f"the origin is {origin}" in body["error"]["message"]


def test_a_program_that_names_no_host_is_no_browser():
    assert ask() == (200, {})
