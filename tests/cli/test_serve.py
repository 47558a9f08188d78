"""``flexalign serve``: what it refuses before anything is loaded."""

import socket
from typing import Any

import pytest
from starlette.testclient import TestClient

from flexalign.errors import ConfigError
from flexalign.serving import server as serving_server
from flexalign.serving.server import require_safe_address


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--adapter", "a", "--aligned", "b"), "not both"),
        (("--lambda-range", "0,2"), "has none"),
        (("--gate", "0.1"), "has none"),
        (("--any-base",), "--adapter"),
        (("--adapter", "a", "--gate", "2"), "gate"),
        (("--adapter", "a", "--lambda-range", "2,1"), "LEAST,LARGEST"),
        (("--context", "1"), "at least 2"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--api-key-env", "NO_SUCH_VARIABLE"), "not set"),
        (("--adapter", "no/such/folder", "--port", "0"), "no/such/folder"),
    ],
)
def test_wrong_input_is_refused(run_cli: Any, options: tuple[str, ...], says: str):
    result = run_cli("serve", "miniature", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(run_cli: Any):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_cli("serve", "no/such/model", "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "in use" in result.stderr


@pytest.mark.parametrize(
    ("options", "status"),
    [((), 403), (("--insecure",), 200), (("--api-key-env", "KEY"), 401)],
    ids=["neither", "insecure", "key"],
)
def test_who_is_served_without_a_key(
    run_cli: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], status: int
):
    served: list[Any] = []

    def ask_once(app: Any, *_: Any, **__: Any) -> None:
        client = TestClient(app, base_url="http://rebound.example")
        served.append(client.get("/v1/models").status_code)

    monkeypatch.setenv("KEY", "sesame")
    monkeypatch.setattr(serving_server, "run_server", ask_once)
    result = run_cli("serve", "miniature", "--port", "0", *options)
    assert result.exit_code == 0, result.stderr
    assert served == [status]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_needs_no_key(host: str):
    require_safe_address(host, None, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_addresses_need_a_key_or_a_word(host: str):
    with pytest.raises(ConfigError, match="--api-key-env"):
        require_safe_address(host, None, insecure=False)
    require_safe_address(host, "key", insecure=False)
    require_safe_address(host, None, insecure=True)
