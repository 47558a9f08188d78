"""What clients may rely on, whichever engine answers; the clients are OpenAI's own and ours."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import torch

from flexalign.data.client import Endpoint
from flexalign.data.thinking import ThinkingTags
from flexalign.lambdas import Adaptive, Route
from flexalign.models.loading import load_tokenizer
from server_process import KEY, QUESTIONS, Server, messages, metric, whole

pytestmark = pytest.mark.slow


@pytest.fixture
def client(either: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=either.url, api_key=KEY, max_retries=0) as client:
        yield client


def closed(text: str) -> str:
    """A text whose last thinking is closed: a message does not say whether it was."""
    return text if "</think>" in text or "<think>" not in text else f"{text}</think>"


def test_a_greedy_chat_is_what_the_library_writes(client: openai.OpenAI, alone: Any):
    for question, lam in ((QUESTIONS[0], 0.3), (QUESTIONS[1], 1.0), (QUESTIONS[2], 0.0)):
        answer = client.chat.completions.create(
            model="miniature",
            messages=messages(question),
            max_tokens=80,
            temperature=0,
            extra_body={"lambda": lam},
        )
        expected = alone(question, lam, 80)
        [choice] = answer.choices
        assert closed(whole(choice.message)) == closed(expected.text)
        assert choice.message.model_extra["reasoning"] == choice.message.reasoning_content
        assert choice.finish_reason == ("length" if expected.truncated else "stop")
        assert answer.usage.completion_tokens == expected.tokens
        counted = answer.usage.completion_tokens_details.reasoning_tokens
        assert counted == ThinkingTags().count_tokens(expected.text, load_tokenizer("miniature"))
        assert answer.model_extra["dial"] == {"lambda": lam, "policy": "fixed", "route": None}


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
    for key in ("prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"):
        assert getattr(usage, key) == getattr(answer.usage, key)
    for choice in answer.choices:
        assert texts[choice.index] == choice.message.content
        assert thinking[choice.index] == (choice.message.reasoning or "")
    assert dials[0] == dials[-1] == answer.model_extra["dial"]
    assert None in dials
    [one] = client.chat.completions.create(**asked | {"n": 1}).choices
    assert one.message.content == answer.choices[0].message.content


def test_other_protocols_tell_what_the_chat_tells(client: openai.OpenAI, either: Server):
    asked: dict[str, Any] = {"model": "miniature", "temperature": 0, "extra_body": {"lambda": 0.2}}
    limit = 80
    chat = client.chat.completions.create(
        messages=messages(QUESTIONS[0]), max_tokens=limit, **asked
    )
    message = chat.choices[0].message

    response = client.responses.create(input=QUESTIONS[0], max_output_tokens=limit, **asked)
    assert response.output_text == message.content
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == message.reasoning
    assert response.model_extra["dial"] == chat.model_extra["dial"]
    assert response.usage.output_tokens == chat.usage.completion_tokens
    with client.responses.stream(input=QUESTIONS[0], max_output_tokens=limit, **asked) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == message.content

    body = {"model": "miniature", "messages": messages(QUESTIONS[0]), "max_tokens": limit}
    told = httpx2.post(
        f"{either.root}/v1/messages",
        json=body | {"temperature": 0, "lambda": 0.2},
        headers={"x-api-key": KEY},
        timeout=120,
    ).json()
    thinking, text = told["content"]
    assert (thinking["thinking"], text["text"]) == (message.reasoning, message.content)
    assert told["usage"]["output_tokens"] == chat.usage.completion_tokens


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


def test_stop_texts_of_a_chat_are_looked_for_outside_the_thinking(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "miniature", "messages": messages(QUESTIONS[0])}
    asked |= {"max_tokens": 400, "temperature": 1, "seed": 4, "extra_body": {"lambda": 0}}
    whole_answer = client.chat.completions.create(**asked).choices[0].message
    stop = whole_answer.content[-1]
    assert stop in whole_answer.reasoning

    answer = client.chat.completions.create(**asked, stop=["never written", stop])
    [choice] = answer.choices
    assert choice.message.reasoning == whole_answer.reasoning
    assert choice.message.content == whole_answer.content.partition(stop)[0]
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0

    streamed = {"reasoning": "", "content": ""}
    for chunk in client.chat.completions.create(**asked, stop=stop, stream=True):
        for one in chunk.choices:
            streamed["content"] += one.delta.content or ""
            streamed["reasoning"] += one.delta.model_extra.get("reasoning") or ""
    assert streamed == {
        "reasoning": choice.message.reasoning,
        "content": choice.message.content,
    }


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


@pytest.mark.parametrize("question", QUESTIONS[:2])
@pytest.mark.parametrize("threshold", [0.0, 0.9999, 1.0])
def test_an_adaptive_answer_is_the_librarys(
    client: openai.OpenAI, alone: Any, question: str, threshold: float
):
    policy = Adaptive(threshold)
    asked: dict[str, Any] = {"model": "miniature", "messages": messages(question), "temperature": 0}
    asked |= {"max_tokens": 60, "extra_body": {"lambda": policy.to_json()}}
    answer = client.chat.completions.create(**asked)
    expected = alone(question, policy, 60)
    dial = answer.model_extra["dial"]
    assert dial.pop("confidence") == pytest.approx(expected.confidence, abs=1e-5)
    assert dial == {
        "policy": "adaptive",
        "route": expected.route,
        "lambda": 1.0 if expected.route == "fast" else 0.0,
        "rejected_tokens": expected.rejected_tokens,
    }
    assert (expected.rejected_tokens > 0) == (expected.route == "slow")
    assert closed(whole(answer.choices[0].message)) == closed(expected.text)
    assert answer.usage.completion_tokens == expected.tokens
    details = answer.usage.completion_tokens_details
    assert details.rejected_prediction_tokens == expected.rejected_tokens
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[-2:]:
        told = dict(chunk.model_extra["dial"])
        assert told.pop("confidence") == pytest.approx(expected.confidence, abs=1e-5)
        assert told == dial
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    text = "".join(delta.content or "" for delta in deltas)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == expected.tokens


def test_a_route_goes_by_the_seed_on_every_engine(client: openai.OpenAI):
    policy = Route(0.5)
    for seed in range(4):
        answer = client.chat.completions.create(
            model="miniature",
            messages=messages(QUESTIONS[0]),
            max_tokens=2,
            seed=seed,
            extra_body={"lambda": policy.to_json()},
        )
        way = policy.draw(torch.Generator().manual_seed(seed))
        assert answer.model_extra["dial"]["route"] == way


def test_before_calibration_effort_is_said_to_be_ignored(client: openai.OpenAI):
    raw = client.chat.completions.with_raw_response.create(
        model="miniature", messages=messages("1+2+3?"), max_tokens=2, reasoning_effort="low"
    )
    assert raw.headers["x-flexalign-ignored"] == "reasoning_effort"


def test_our_own_client_reads_it(either: Server, alone: Any):
    endpoint = Endpoint(either.url, "miniature", 80, temperature=0, attempts=1, api_key=KEY)
    assert endpoint.models() == ["miniature"]
    response = endpoint.ask(messages(QUESTIONS[0]), 1, **{"lambda": 0.0})
    expected = alone(QUESTIONS[0], 0.0, 80)
    assert response.text == expected.text
    assert response.tokens == expected.tokens
    assert response.dial["lambda"] == 0.0


def test_errors_have_openais_form(client: openai.OpenAI, either: Server):
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
        (openai.NotFoundError, {"model": "other"}),
    ):
        with pytest.raises(kind) as caught:
            ask(**values)
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["message"]
        assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")
        assert not isinstance(caught.value.body["code"], int)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=either.url, api_key="open", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="miniature", input="a")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "not_found_error"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="miniature", prompt=[5, 66])
    with pytest.raises(openai.APIStatusError) as caught:
        ask(extra_body={"user": "a" * 5_000_000})
    assert caught.value.status_code == 413
    ask()


def test_metrics_count_the_dials(client: openai.OpenAI, either: Server):
    def counted() -> list[float]:
        return [metric(either, f"flexalign_{name}") for name in ("lambda_count", "routes_total")]

    before = counted()
    for dial in (0.75, {"policy": "route", "share": 0}, {"policy": "adaptive", "threshold": 1}):
        client.chat.completions.create(
            model="miniature",
            messages=messages(QUESTIONS[0]),
            max_tokens=3,
            extra_body={"lambda": dial},
        )
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="miniature", prompt="1", extra_body={"lambda": 9})
    grown = [after - then for after, then in zip(counted(), before, strict=True)]
    assert grown == [1, 2]


def test_each_of_many_gets_the_answer_it_gets_alone(either: Server, alone: Any):
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
        async with openai.AsyncOpenAI(base_url=either.url, api_key=KEY, max_retries=0) as client:
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
