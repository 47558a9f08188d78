"""vLLM itself behind the dial: what only it can show, and what becomes of clients when it dies."""

import http.client
import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from server_process import KEY, QUESTIONS, Server, messages, metric

pytestmark = pytest.mark.full

LONG = "+".join(["1"] * 60) + "?"
"""A prompt of several blocks of the cache."""


@pytest.fixture
def client(vllm_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=vllm_server.url, api_key=KEY, max_retries=0) as client:
        yield client


def health(server: Server) -> int:
    """The status of /health; 0 where nothing listens."""
    try:
        with urllib.request.urlopen(f"{server.root}/health") as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait(until: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_the_slow_prompt_is_a_hit_of_the_prefix_cache(
    client: openai.OpenAI, vllm_server: Server, stream: bool
):
    hits = metric(vllm_server, "vllm:prefix_cache_hits_total")
    asked: dict[str, Any] = {
        "model": "miniature",
        "messages": messages(f"{int(stream) + 2}+{LONG}"),
    }
    asked |= {"max_tokens": 4, "temperature": 0, "stream": stream}
    asked["extra_body"] = {"lambda": {"policy": "adaptive", "threshold": 1}}
    if stream:
        *_, last = client.chat.completions.create(**asked, stream_options={"include_usage": True})
        usage, dial = last.usage, last.model_extra["dial"]
    else:
        answer = client.chat.completions.create(**asked)
        usage, dial = answer.usage, answer.model_extra["dial"]
    assert dial["route"] == "slow"
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached == (usage.prompt_tokens - 1) // 32 * 32 > 0
    assert metric(vllm_server, "vllm:prefix_cache_hits_total") - hits == cached


def test_seeds_of_many_long_prompts_at_once_kill_nothing(client: openai.OpenAI):
    def ask(number: int) -> str:
        prompt = "+".join(["1", "2", "3", "4"] * 60) + f"+{number}?"
        asked = {"model": "miniature", "prompt": prompt, "seed": number, "max_tokens": 3}
        return client.completions.create(**asked, temperature=1).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(number) for number in range(16)]


def test_unknown_keys_and_arguments_are_refused_before_vllm(client: openai.OpenAI):
    asked: Any = {"model": "miniature", "messages": [{"role": "user", "content": "1+2?"}]}
    for body, says in (
        ({"temprature": 1}, "did you mean 'temperature'?"),
        ({"chat_template_kwargs": {"thinking": 1}}, "which the chat template does not read"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(says)):
            client.chat.completions.create(**asked, max_tokens=2, extra_body=body)
    known = {"top_k": 5, "repetition_penalty": 1.1, "store": False}
    assert client.chat.completions.create(**asked, max_tokens=2, extra_body=known).choices


def test_reasoning_effort_does_not_reach_the_prompt(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "miniature", "messages": messages(QUESTIONS[0])}
    asked |= {"max_tokens": 2, "extra_body": {"return_prompt_text": True}}
    prompts = set()
    for effort in (openai.NOT_GIVEN, "none", "high"):
        raw = client.chat.completions.with_raw_response.create(**asked, reasoning_effort=effort)
        assert ("x-flexalign-ignored" in raw.headers) == (effort is not openai.NOT_GIVEN)
        prompts.add(json.loads(raw.content)["prompt_text"])
    assert len(prompts) == 1


def test_no_route_gets_round_the_operators_range(vllm_server: Server):
    chat = {"model": "miniature", "messages": messages("1+2?"), "max_tokens": 2}
    extras = {"vllm_xargs": {"lambda": 5}}
    token_ids = {"token_ids": [1, 5], "sampling_params": {"extra_args": {"lambda": 5}}}
    for path, body in (
        ("/v1/chat/completions", chat | {"lambda": 5}),
        ("/v1/chat/completions", chat | extras),
        ("/v1/completions", {"model": "miniature", "prompt": "1"} | extras),
        ("/v1/chat/completions/batch", chat | {"messages": [messages("1+2?")]} | extras),
        ("/v1/responses", {"model": "miniature", "input": "1"} | extras),
        ("/v1/messages", chat | extras),
        ("/invocations", chat | extras),
        ("/inference/v1/generate", token_ids),
        ("/v1/responses", {"model": "miniature", "input": "1", "lambda": 5}),
        ("/v1/messages", chat | {"lambda": 5}),
    ):
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        request = urllib.request.Request(
            vllm_server.root + path, json.dumps(body).encode(), headers
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400, path
        error = json.load(caught.value)["error"]
        if path == "/v1/messages":  # in the form of its protocol, which has no code
            assert error["type"] == "invalid_request_error"
            assert "lambda" in error["message"]
        else:
            assert error["code"] == "invalid_dial", path


def test_nothing_answers_without_the_key(vllm_server: Server):
    for path in ("/v1/chat/completions", "/invocations", "/v1/models"):
        data = None if path == "/v1/models" else b"{}"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(vllm_server.root + path, data))
        assert caught.value.code == 401
        assert json.load(caught.value)["error"]["code"] == "invalid_api_key"
    assert health(vllm_server) == 200


@pytest.mark.parametrize("dial", [0.5, {"policy": "adaptive", "threshold": 0}])
def test_a_client_that_leaves_frees_its_place(vllm_server: Server, dial: Any):
    def running() -> float:
        return metric(vllm_server, "vllm:num_requests_running")

    asked = {"model": "miniature", "messages": messages("1+2+3?"), "max_tokens": 900}
    body = json.dumps(asked | {"lambda": dial, "ignore_eos": True})
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    written = metric(vllm_server, "vllm:generation_tokens_total")
    leaving = http.client.HTTPConnection(vllm_server.root.removeprefix("http://"))
    leaving.request("POST", "/v1/chat/completions", body, headers)
    wait(lambda: running() > 0)
    leaving.close()
    wait(lambda: running() == 0)
    assert metric(vllm_server, "vllm:generation_tokens_total") - written < 900


def engine_of(server: Server) -> int:
    """The process that holds the model."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    family = {server.process.pid}
    for _ in range(3):
        family |= {int(pid) for pid, parent, *_ in rows if int(parent) in family}
    [engine] = [
        int(pid) for pid, _, *words in rows if int(pid) in family and "EngineCore" in "".join(words)
    ]
    return engine


def test_a_full_queue_and_a_dead_engine_are_told_and_a_restart_serves_again(start_vllm: Any):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start_vllm("--queue", "12", port=port)
    asked: dict[str, Any] = {"model": "miniature", "messages": messages(QUESTIONS[3])}
    asked |= {"max_tokens": 900, "temperature": 1, "n": 8, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**asked, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(**asked)
        assert full.value.response.headers["retry-after"] == "1"
        subprocess.run(["kill", "-KILL", str(engine_of(server))], check=True)
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert "EngineCore" in str(caught.value)
        if server.process.poll() is None:
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                client.chat.completions.create(**asked | {"max_tokens": 2})
        wait(lambda: health(server) != 200)
    assert server.process.wait(60) == 1
    assert "vLLM has ended" in server.log.read_text()

    server = start_vllm("--grace", "60", port=port)
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            **asked
            | {"max_tokens": 200, "n": 1, "extra_body": {"lambda": 0.5, "ignore_eos": True}},
            stream=True,
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    assert server.process.wait(60) == 0
    assert health(server) == 0
