"""The server as clients know it: OpenAI's own, ours, and hostile ones, over a real socket."""

import asyncio
import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from flexalign.data.endpoint import Endpoint
from flexalign.decoding.responses import Response, generate_responses
from flexalign.inra import InRaModel
from server_process import KEY, Server

pytestmark = pytest.mark.slow

QUESTIONS = ["3+14+15?", "7+7+7?", "12+5+7+1?", "30+4+5+1+2?"]


def messages(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone() -> Callable[..., Response]:
    """What the library writes for one question, alone."""
    model = InRaModel.from_pretrained("miniature", "miniature:fast")
    model.inra_config = replace(model.inra_config, lambda_range=(-1.0, 2.0))

    def write(question: str, lam: float, tokens: int, **more: Any) -> Response:
        [response] = generate_responses(
            model,
            model.tokenizer,
            [messages(question)],
            max_new_tokens=tokens,
            lam=[lam],
            **{"temperature": 0, **more},
        )
        return response

    return write


def whole(message: Any) -> str:
    """A message's text as the model wrote it."""
    if message.reasoning is None:
        return message.content
    return f"<think>{message.reasoning}</think>{message.content}"


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.root}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)


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


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "miniature",
        "messages": messages(QUESTIONS[1]),
        "max_tokens": 60,
        "seed": 3,
        "n": 2,
    }
    answer = client.chat.completions.create(**asked)
    texts = {0: "", 1: ""}
    thinking = {0: "", 1: ""}
    dials, usage = [], None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        dials.append(chunk.model_extra.get("dial"))
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            thinking[choice.index] += choice.delta.model_extra.get("reasoning") or ""
    assert usage == answer.usage
    for choice in answer.choices:
        assert texts[choice.index] == choice.message.content
        assert thinking[choice.index] == (choice.message.reasoning or "")
    assert dials[0] == dials[-1] == answer.model_extra["dial"]
    assert None in dials
    [one] = client.chat.completions.create(**asked | {"n": 1}).choices
    assert one.message.content == answer.choices[0].message.content


def test_completions_take_texts_and_tokens(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "miniature", "max_tokens": 5, "temperature": 0}
    asked["extra_body"] = {"lambda": 0}
    texts = client.completions.create(prompt=["1+2+3?", "7+7+7?"], logprobs=2, **asked)
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert texts.usage.completion_tokens == 10
    told = texts.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 5
    tops = zip(told.tokens, told.top_logprobs, strict=True)
    assert all(max(top.values()) == top[name] for name, top in tops)
    pieces = client.completions.create(prompt="1+2+3?", stream=True, **asked)
    assert "".join(piece.choices[0].text for piece in pieces) == texts.choices[0].text
    stop = client.completions.create(prompt="1+2+3?", stop=["+"], **asked | {"max_tokens": 40})
    assert stop.choices[0].finish_reason == "stop"
    assert "+" not in stop.choices[0].text


def test_chat_log_probabilities(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "miniature", "messages": messages("1+2+3?"), "max_tokens": 4}
    asked |= {"temperature": 0, "logprobs": True, "top_logprobs": 3}
    [choice] = client.chat.completions.create(**asked).choices
    assert len(choice.logprobs.content) == 4
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].token == token.token
        assert bytes(token.bytes).decode() == token.token
        assert token.logprob <= 0
    streamed = client.chat.completions.create(**asked, stream=True)
    told = [one for piece in streamed for one in (piece.choices[0].logprobs or [])]
    content = [one for name, value in told if name == "content" for one in value or []]
    assert content == choice.logprobs.content


def test_policies_tell_their_way(client: openai.OpenAI):
    routes = set()
    for threshold in (0.0, 1.0):
        answer = client.chat.completions.create(
            model="miniature",
            messages=messages(QUESTIONS[0]),
            max_tokens=100,
            temperature=0,
            extra_body={"lambda": {"policy": "adaptive", "threshold": threshold}},
        )
        dial = answer.model_extra["dial"]
        assert dial["policy"] == "adaptive"
        assert dial["lambda"] == (1.0 if dial["route"] == "fast" else 0.0)
        details = answer.usage.completion_tokens_details
        assert details.rejected_prediction_tokens == dial["rejected_tokens"]
        assert (dial["rejected_tokens"] > 0) == (dial["route"] == "slow")
        routes.add(dial["route"])
    assert routes == {"fast", "slow"}


def test_before_calibration_effort_is_said_to_be_ignored(client: openai.OpenAI):
    raw = client.chat.completions.with_raw_response.create(
        model="miniature", messages=messages("1+2+3?"), max_tokens=2, reasoning_effort="low"
    )
    assert raw.headers["x-flexalign-ignored"] == "reasoning_effort"


def test_our_own_client_reads_it(server: Server, alone: Any):
    endpoint = Endpoint(server.url, "miniature", 80, temperature=0, attempts=1, api_key=KEY)
    assert endpoint.models() == ["miniature"]
    response = endpoint.ask(messages(QUESTIONS[0]), 1, **{"lambda": 0.0})
    expected = alone(QUESTIONS[0], 0.0, 80)
    assert response.text == expected.text
    assert response.tokens == expected.tokens
    assert response.dial["lambda"] == 0.0


def test_errors_have_openais_form(client: openai.OpenAI, server: Server):
    def ask(**values: Any) -> Any:
        asked = {"model": "miniature", "messages": messages("1+2?"), "max_tokens": 2}
        return client.chat.completions.create(**asked | values)

    for kind, values in (
        (openai.BadRequestError, {"extra_body": {"lambda": 3}}),
        (openai.BadRequestError, {"extra_body": {"lamda": 0.5}}),
        (openai.BadRequestError, {"extra_body": {"lambda": 1, "control": 1}}),
        (openai.BadRequestError, {"extra_body": {"effort": 50}}),
        (openai.BadRequestError, {"max_tokens": 2000}),
        (openai.BadRequestError, {"messages": messages("1+" * 1500 + "1?")}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"n": 41}),
        (openai.NotFoundError, {"model": "other"}),
    ):
        with pytest.raises(kind) as caught:
            ask(**values)
        assert caught.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="open", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model="miniature", input="a")
    with pytest.raises(openai.BadRequestError, match="token id"):
        client.completions.create(model="miniature", prompt=[5, 66])
    with pytest.raises(openai.APIStatusError) as caught:
        ask(extra_body={"user": "a" * 5_000_000})
    assert caught.value.status_code == 413
    ask()


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


def test_each_of_many_gets_the_answer_it_gets_alone(server: Server, alone: Any):
    """Five λ in one batch; some stream, some leave in the middle, lengths differ."""
    lams = [0.0, 0.3, 0.7, 1.0, 1.5]
    asked = [
        (QUESTIONS[i % 4], lams[i % 5], 6 + 3 * (i % 7), ("whole", "stream", "leave")[i % 3])
        for i in range(32)
    ]

    async def ask(client: Any, question: str, lam: float, tokens: int, way: str) -> str | None:
        given: dict[str, Any] = {
            "model": "miniature",
            "messages": messages(question),
            "max_tokens": tokens,
            "temperature": 0,
            "extra_body": {"lambda": lam},
        }
        if way == "whole":
            answer = await client.chat.completions.create(**given)
            return whole(answer.choices[0].message)
        stream = await client.chat.completions.create(**given, stream=True)
        text = thinking = ""
        async for chunk in stream:
            delta = chunk.choices[0].delta
            text += delta.content or ""
            thinking += delta.model_extra.get("reasoning") or ""
            if way == "leave" and len(text + thinking) > 5:
                await stream.close()
                return None
        return thinking + "</think>" + text if thinking else text

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, *one) for one in asked)))

    answers = asyncio.run(ask_all())
    for (question, lam, tokens, way), answer in zip(asked, answers, strict=True):
        expected = alone(question, lam, tokens).text
        if way != "leave":
            assert answer is not None
            bare = [
                text.replace("<think>", "").replace("</think>", "") for text in (answer, expected)
            ]
            assert bare[0] == bare[1], (question, lam)


def test_health_and_metrics_need_no_key(server: Server):
    with urllib.request.urlopen(f"{server.root}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    assert metric(server, "flexalign_requests_total") > 0
    assert metric(server, "flexalign_lambda_count") > 0
    assert metric(server, "flexalign_generated_tokens_total") > 0


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
        time.sleep(0.5)
        with pytest.raises(openai.APIConnectionError):
            client.with_options(timeout=5).models.list()
        last = None
        for chunk in stream:
            last = chunk
        assert last is not None
        assert last.choices[0].finish_reason in ("stop", "length")
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()
