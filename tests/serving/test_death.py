"""The server dies: whoever waits learns it, and a supervisor's restart serves again."""

import asyncio
import http.client
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from asgi import read, request
from flexalign.serving.app import create_app
from flexalign.serving.engine import InRaRunner
from flexalign.serving.server import ServeOptions, load_service
from server_process import Server, metric

WAITING = 4
DIAL = ("miniature", "--adapter", "miniature:fast")
LONG: dict[str, Any] = {
    "model": "miniature",
    "messages": [{"role": "user", "content": "30+4+5+1+2?"}],
    "max_tokens": 900,
    "temperature": 0,
    "stop": ["never"],
    "n": 30,
    "extra_body": {"lambda": 0.5},
}


def wait_and_stream(server: Server, act: Callable[[], None]) -> list[Exception]:
    """Let clients wait for whole answers and one read a stream; act; return what each met."""

    async def whole(client: openai.AsyncOpenAI) -> None:
        await client.chat.completions.create(**LONG)

    async def stream(client: openai.AsyncOpenAI, begun: asyncio.Event) -> None:
        async for _ in await client.chat.completions.create(**LONG, stream=True):
            begun.set()

    async def run() -> list[Any]:
        begun = asyncio.Event()
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key="none", max_retries=0, timeout=60
        ) as client:
            tasks = [asyncio.create_task(stream(client, begun))]
            await asyncio.wait_for(begun.wait(), 60)
            tasks += [asyncio.create_task(whole(client)) for _ in range(WAITING)]
            while metric(server, "flexalign_lambda_count") < 1 + WAITING:
                await asyncio.sleep(0.01)
            act()
            return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.full
def test_a_killed_server_is_a_broken_connection_and_a_restart_serves_again(start_server: Any):
    server = start_server(*DIAL)
    port = int(server.root.rpartition(":")[2])
    start = time.monotonic()
    met = wait_and_stream(server, lambda: server.process.send_signal(signal.SIGKILL))
    assert time.monotonic() - start < 60  # at once, and not when their patience ends
    assert all(isinstance(error, openai.APIConnectionError) for error in met[1:]), met
    assert isinstance(met[0], Exception)
    assert server.process.wait(10) == -signal.SIGKILL
    again = start_server(*DIAL, port=port)
    assert again.url == server.url
    with openai.OpenAI(base_url=again.url, api_key="none", max_retries=0) as client:
        served = client.chat.completions.create(**LONG | {"max_tokens": 3, "n": 1})
    assert served.usage.completion_tokens == 3


@pytest.mark.full
def test_a_model_that_works_no_more_ends_the_server_and_everybody_is_told(start_server: Any):
    server = start_server(*DIAL, program=(str(Path(__file__).with_name("failing.py")),))
    unwell = threading.Event()

    def watch() -> None:
        while not unwell.is_set():
            try:
                urllib.request.urlopen(f"{server.root}/health", timeout=5).close()
            except OSError:  # 503, or nobody there any more
                unwell.set()
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    met = wait_and_stream(server, lambda: server.process.send_signal(signal.SIGUSR1))
    assert isinstance(met[0], openai.APIError)
    for error in met[1:]:
        assert isinstance(error, openai.InternalServerError), met
        assert error.status_code == http.client.SERVICE_UNAVAILABLE
    assert all("the engine has failed" in str(error) for error in met)
    assert server.process.wait(30) == 1
    assert unwell.wait(10)
    watching.join()
    told = server.log.read_text()
    assert "the device is lost" in told
    assert "error: the engine has failed" in told


class Broken(InRaRunner):
    def step(self, *given: Any) -> Any:
        raise SystemExit("out of the step")


@pytest.fixture
def broken() -> Iterator[Any]:
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    engine = service.engine
    engine._runner = engine._batch._runner = Broken(engine._runner.model)
    yield create_app(service, rules)
    engine.stop()


def test_health_turns_and_requests_are_refused_in_openais_form(broken: Any):
    def health() -> tuple[int, bytes]:
        return read(request(broken, "/health", method="GET"))

    assert health() == (http.client.OK, b'{"status":"ok"}')
    for told in ("has failed", "has stopped"):
        status, body = read(request(broken, "/v1/completions", {"prompt": "1+2?", "max_tokens": 2}))
        assert status == http.client.SERVICE_UNAVAILABLE
        assert told in body.decode()
        assert b'"type":"server_error"' in body
    assert health()[0] == http.client.SERVICE_UNAVAILABLE
