"""The server as clients know it: OpenAI's own, ours, and hostile ones, over a real socket."""

import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from server_process import KEY, QUESTIONS, Server, messages, metric, whole

pytestmark = pytest.mark.slow


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def test_a_chat_is_what_the_library_writes(client: openai.OpenAI, alone: Any):
    answer = client.chat.completions.create(
        model="miniature",
        messages=messages(QUESTIONS[0]),
        max_tokens=80,
        seed=5,
        extra_body={"lambda": 0.3},
    )
    expected = alone(QUESTIONS[0], 0.3, 80, temperature=1, seeds=[5])
    [choice] = answer.choices
    assert whole(choice.message) == expected.text
    assert choice.message.reasoning_content == choice.message.reasoning
    assert choice.finish_reason == ("length" if expected.truncated else "stop")
    assert answer.usage.completion_tokens == expected.tokens
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert answer.model_extra["dial"] == {"lambda": 0.3, "policy": "fixed", "route": None}


def test_a_full_queue_says_when_to_come_back(client: openai.OpenAI, server: Server):
    asked: dict[str, Any] = {
        "model": "miniature",
        "messages": messages("1+2+3?"),
        "max_tokens": 900,
    }
    asked |= {"stop": ["never"], "n": 40}
    stream = client.chat.completions.create(**asked, stream=True)
    next(stream)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.response.headers["retry-after"] == "1"
    stream.close()
    deadline = time.monotonic() + 30
    while metric(server, "flexalign_running") + metric(server, "flexalign_waiting") > 0:
        assert time.monotonic() < deadline
    assert metric(server, "flexalign_cancelled_total") > 0
    client.chat.completions.create(**asked | {"n": 1, "max_tokens": 2})


def test_health_and_metrics_need_no_key(server: Server):
    with urllib.request.urlopen(f"{server.root}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    assert metric(server, "flexalign_requests_total") > 0
    assert metric(server, "flexalign_lambda_count") > 0
    assert metric(server, "flexalign_generated_tokens_total") > 0


def takes_requests(client: openai.OpenAI) -> bool:
    try:
        client.models.list()
    except openai.APIConnectionError:
        return False
    return True


def test_sigterm_lets_what_runs_finish(start_server: Any):
    server = start_server("miniature", "--aligned", "miniature:aligned", "--grace", "60")
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="miniature",
            messages=messages(QUESTIONS[3]),
            max_tokens=60,
            stream=True,
            temperature=0,
            extra_body={"lambda": 0.5},
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 120
        while takes_requests(client):
            assert time.monotonic() < deadline
        last = None
        for chunk in stream:
            last = chunk
        assert last is not None
        assert last.choices[0].finish_reason in ("stop", "length")
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_sigterm_ends_an_idle_server(start_server: Any):
    server = start_server("miniature", "--adapter", "miniature:fast")
    server.process.send_signal(signal.SIGTERM)  # at once: from its address on it ends as documented
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def test_whoever_is_not_done_within_the_grace_is_told(start_server: Any):
    dial = ("miniature", "--adapter", "miniature:fast", "--batch-size", "1", "--grace", "1")
    server = start_server(*dial)
    asked: dict[str, Any] = {"model": "miniature", "messages": messages(QUESTIONS[3]), "n": 60}
    with (
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(1) as aside,
    ):
        stream = client.chat.completions.create(**asked, stream=True)
        next(stream)
        waiting = aside.submit(client.chat.completions.create, **asked)
        while metric(server, "flexalign_lambda_count") < 2:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        error = waiting.exception()
    assert isinstance(error, openai.InternalServerError)
    assert error.status_code == 503
    assert "shutting down" in error.body["message"]
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()
