"""``flexalign serve``: what it refuses before anything is loaded."""

import json
import os
import signal
import socket
import time
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from flexalign.errors import ConfigError
from flexalign.serving import server as serving_server
from flexalign.serving.address import open_socket
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
        (("--adapter", "a", "--lambda-range", "nan,1"), "--lambda-range takes LEAST,LARGEST"),
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
    assert "in use; choose another --host or --port" in result.stderr


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


def test_without_the_packages_the_way_to_get_them_is_said(
    run_cli: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flexalign.cli.serve._NEEDED", ("fastapi", "no_such_package"))
    result = run_cli("serve", "miniature")
    assert result.exit_code == 2
    assert "serving needs no_such_package; install it with: pip install" in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_where_it_serves_is_told_as_json(run_cli: Any, monkeypatch: pytest.MonkeyPatch, host: str):
    served: list[Any] = []

    def run_server(app: Any, listening: Any, *, grace: float, is_well: Any, on_ready: Any) -> None:
        assert is_well()
        on_ready()
        served.append(listening.getsockname()[1])

    monkeypatch.setattr(serving_server, "run_server", run_server)
    dial = ("--adapter", "miniature:fast", "--playground")
    result = run_cli("serve", "miniature", *dial, "--host", host, "--port", 0, "--json")
    assert result.exit_code == 0, result.stderr
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{served[0]}"
    told = {"url": f"{url}/v1", "model": "miniature", "lambda_range": [0.0, 1.0]}
    assert json.loads(result.stdout) == told
    assert f"playground: {url}/playground" in result.stderr


def test_a_sigterm_before_the_server_runs_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    run, before = uvicorn.Server.run, signal.getsignal(signal.SIGTERM)
    ready: list[bool] = []

    def run_late(self: Any, sockets: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        run(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", run_late)
    deadline = time.monotonic() + 60  # where the signal is lost, the engine's end is what ends it
    with open_socket("127.0.0.1", 0) as listening:
        serving_server.run_server(
            FastAPI(),
            listening,
            grace=1,
            is_well=lambda: time.monotonic() < deadline,
            on_ready=lambda: ready.append(True),
        )
    assert ready == [True]
    assert signal.getsignal(signal.SIGTERM) == before
