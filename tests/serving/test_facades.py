"""The routes of other protocols: each tells what the chat route tells, in its own form."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from asgi import read, request
from flexalign.lambdas import Fixed
from flexalign.serving.app import create_app
from flexalign.serving.facades import MessagesFacade, ResponsesFacade, with_facades
from flexalign.serving.requests import RunningRequest
from flexalign.serving.server import ServeOptions, load_service
from flexalign.serving.service import Service

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TURNS = [{"role": "user", "content": "3+14+15?"}]
SAME = {"lambda": 0.0, "seed": 3, "model": "miniature"}


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    # As of a calibrated adapter.
    rules = replace(rules, effort=lambda effort: Fixed(max(0.0, 1 - effort / 100)))
    yield create_app(service, rules)
    service.engine.stop()


def ask(app: Any, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, content = read(request(app, path, body))
    return status, json.loads(content)


def events(app: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    status, content = read(request(app, path, body | {"stream": True}))
    assert status == 200
    told = []
    for event in content.decode().strip().split("\n\n"):
        name, data = event.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


@pytest.fixture(scope="module")
def chat(app: Any) -> dict[str, Any]:
    status, answer = ask(app, CHAT, SAME | {"messages": TURNS})
    assert status == 200
    return answer


def test_a_response_is_the_chats_answer(app: Any, chat: dict[str, Any]):
    status, answer = ask(app, RESPONSES, SAME | {"input": "3+14+15?"})
    message = chat["choices"][0]["message"]
    assert status == 200
    reasoning, written = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": message["reasoning"]}]
    assert written["content"][0]["text"] == message["content"]
    assert (answer["status"], answer["store"], answer["dial"]) == ("completed", False, chat["dial"])

    usage = answer["usage"]
    assert usage["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    counted = chat["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == counted > 0


def test_a_message_is_the_chats_answer(app: Any, chat: dict[str, Any]):
    status, answer = ask(app, MESSAGES, SAME | {"messages": TURNS, "max_tokens": 200})
    message = chat["choices"][0]["message"]
    assert status == 200
    thinking, text = answer["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", message["reasoning"])
    assert text == {"type": "text", "text": message["content"]}
    assert (answer["stop_reason"], answer["dial"]) == ("end_turn", chat["dial"])
    counts = chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"]
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == counts


def test_the_events_of_a_response_make_the_response(app: Any, chat: dict[str, Any]):
    told = events(app, RESPONSES, SAME | {"input": TURNS})
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told][:2] == ["response.created", "response.in_progress"]
    assert told[-1]["type"] == "response.completed"

    message = chat["choices"][0]["message"]
    for part, text in (("reasoning_text", "reasoning"), ("output_text", "content")):
        deltas = [e["delta"] for e in told if e["type"] == f"response.{part}.delta"]
        (done,) = [e["text"] for e in told if e["type"] == f"response.{part}.done"]
        assert len(deltas) >= 1
        assert "".join(deltas) == done == message[text]
    final = told[-1]["response"]
    assert [item["content"][0]["text"] for item in final["output"]] == [
        message["reasoning"],
        message["content"],
    ]
    opened = [e["item"]["id"] for e in told if e["type"] == "response.output_item.added"]
    closed = [e["item"]["id"] for e in told if e["type"] == "response.output_item.done"]
    assert opened == closed == [item["id"] for item in final["output"]]
    assert final["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]


def test_the_events_of_a_message_make_the_message(app: Any, chat: dict[str, Any]):
    told = events(app, MESSAGES, SAME | {"messages": TURNS, "max_tokens": 200})
    assert (told[0]["type"], told[-1]["type"]) == ("message_start", "message_stop")
    assert told[0]["message"]["content"] == []
    texts = ["", ""]
    for event in told:
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            texts[event["index"]] += delta.get("thinking", delta.get("text"))
    message = chat["choices"][0]["message"]
    assert texts == [message["reasoning"], message["content"]]

    starts = [e["content_block"]["type"] for e in told if e["type"] == "content_block_start"]
    stops = [e["index"] for e in told if e["type"] == "content_block_stop"]
    assert (starts, stops) == (["thinking", "text"], [0, 1])
    ended = told[-2]
    assert ended["delta"]["stop_reason"] == "end_turn"
    assert ended["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]


def test_an_answer_that_is_cut_off_says_so(app: Any):
    _, response = ask(app, RESPONSES, SAME | {"input": TURNS, "max_output_tokens": 3})
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (
        events(app, RESPONSES, SAME | {"input": TURNS, "max_output_tokens": 3})[-1]["type"]
        == "response.incomplete"
    )
    _, message = ask(app, MESSAGES, SAME | {"messages": TURNS, "max_tokens": 3})
    assert message["stop_reason"] == "max_tokens"


def test_the_effort_of_each_protocol_turns_the_dial(app: Any):
    def route(path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = ask(app, path, body)
        assert status == 200
        dial: dict[str, Any] = answer["dial"]
        return dial | {"route": None}

    asked = {"messages": TURNS, "max_tokens": 40, "seed": 1}
    for effort, lam in (("low", 0.75), ("high", 0.25)):
        expected = route(CHAT, asked | {"reasoning_effort": effort})
        assert expected["lambda"] == lam
        assert route(MESSAGES, asked | {"output_config": {"effort": effort}}) == expected
        items = {"input": TURNS, "max_output_tokens": 40, "seed": 1}
        assert route(RESPONSES, items | {"reasoning": {"effort": effort}}) == expected
    assert (
        route(RESPONSES, {"input": TURNS, "max_output_tokens": 4, "lambda": 0.5})["lambda"] == 0.5
    )


def test_items_become_the_turns_of_a_conversation():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "1+"}, {"type": "input_text", "text": "2?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "3"}]},
        {"role": "user", "content": "and 1?"},
    ]  # fmt: skip
    chat, _, _ = ResponsesFacade(None).to_chat({"input": items, "instructions": "be brief"})
    expected = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "3", "reasoning_content": "t"},
        {"role": "user", "content": "and 1?"},
    ]
    assert chat["messages"] == expected

    turns = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": ""}, {"type": "text", "text": "3"}]},
        {"role": "user", "content": [{"type": "text", "text": "and 1?"}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "be brief"}]
    body = {"messages": turns, "system": system, "max_tokens": 3, "stop_sequences": ["a"]}
    chat, _, _ = MessagesFacade(None).to_chat(body)
    assert chat["messages"] == expected
    assert (chat["stop"], chat["max_tokens"]) == (["a"], 3)


def test_what_has_no_effect_is_named(app: Any):
    body = {"messages": TURNS, "max_tokens": 2, "thinking": {"type": "enabled", "budget_tokens": 9}}
    sent = request(app, MESSAGES, body)
    assert dict(sent[0]["headers"])[b"x-flexalign-ignored"] == b"thinking"
    sent = request(app, RESPONSES, {"input": "1?", "reasoning": {"summary": "auto"}})
    assert dict(sent[0]["headers"])[b"x-flexalign-ignored"] == b"reasoning.summary"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (RESPONSES, {}, "input must be a text or a list of at least one item, got null"),
        (RESPONSES, {"input": []}, "input must be a text or a list of at least one item"),
        (RESPONSES, {"input": [{"type": "function_call"}]}, "input[0] must be a message"),
        (RESPONSES, {"input": [{"role": "user", "content": 3}]}, "input[0].content must be"),
        (RESPONSES, {"input": "a", "store": True}, "store: true is not served by this route"),
        (RESPONSES, {"input": "a", "previous_response_id": "r"}, "previous_response_id"),
        (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}, "tools: "),
        (RESPONSES, {"input": "a", "n": 2}, "n: 2 is not served"),
        (RESPONSES, {"input": "a", "reasoning": "low"}, "reasoning must be an object"),
        (RESPONSES, {"input": "a", "reasoning": {"effort": "some"}}, "reasoning_effort must be one"),
        (MESSAGES, {"messages": TURNS, "max_tokens": 3, "output_config": {"effort": 3}}, "effort"),
        (RESPONSES, {"input": "a", "lambda": 7}, "outside the range"),
        (RESPONSES, {"input": "a", "temprature": 1}, "'temprature' is not known"),
        (MESSAGES, {"messages": TURNS}, "max_tokens must be a whole number"),
        (MESSAGES, {"max_tokens": 3}, "messages must be a list of at least one message"),
        (MESSAGES, {"messages": [{"role": "tool", "content": "a"}], "max_tokens": 3}, "messages[0]"),
        (MESSAGES, {"messages": TURNS, "max_tokens": 3, "tools": [{}]}, "tools: "),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(
    app: Any, path: str, body: dict[str, Any], message: str
):
    status, answer = ask(app, path, body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer.get("type", "error") == "error"


def test_the_gate_takes_both_forms_of_a_key():
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    try:
        app = create_app(service, rules, key="sesame")
        body = {"messages": TURNS, "max_tokens": 1}
        for header in ((b"x-api-key", b"sesame"), (b"authorization", b"Bearer sesame")):
            assert read(request(app, MESSAGES, body, headers=[header]))[0] == 200
        for header in ((b"x-api-key", b"other"), (b"x-api-key", b""), (b"x-else", b"sesame")):
            assert read(request(app, MESSAGES, body, headers=[header]))[0] == 401
    finally:
        service.engine.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (RESPONSES, SAME | {"input": TURNS}, 200),
        (RESPONSES, SAME | {"input": TURNS, "max_output_tokens": 3}, 200),
        (RESPONSES, {"input": "1?", "seed": 3, "reasoning": {"summary": "auto"}}, 200),
        (RESPONSES, SAME | {"input": TURNS, "model": "other"}, 404),
        (MESSAGES, SAME | {"messages": TURNS, "max_tokens": 200}, 200),
        (MESSAGES, {"messages": TURNS, "max_tokens": 3, "seed": 3, "lambda": "auto"}, 200),
        (MESSAGES, SAME | {"messages": TURNS, "max_tokens": 3, "thinking": {"type": "x"}}, 200),
        (MESSAGES, SAME | {"messages": TURNS, "max_tokens": 3, "lambda": 7}, 400),
    ],
)
def test_an_answer_is_the_same_from_objects_and_from_bytes(
    app: Any, path: str, body: dict[str, Any], status: int, stream: bool
):
    # The local server hands its answer over as objects; facades before it see its chat route as bytes.
    def told(served: Any) -> tuple[int, dict[bytes, bytes], str]:
        sent = request(served, path, body | {"stream": stream})
        headers = {key: value for key, value in sent[0]["headers"] if key != b"x-request-id"}
        found, content = read(sent)
        assert sent[-1].get("more_body", False) is False
        assert headers.get(b"content-length") == (
            None if stream and found == 200 else str(len(content)).encode()
        )
        return found, headers, _without_ids(content.decode())

    answer = told(app)
    assert answer[0] == status
    assert told(with_facades(app, None)) == answer


def _without_ids(text: str) -> str:
    return re.sub(r'_[0-9a-f]{32}|"created_at": [0-9]+', "", text)


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_a_stream_that_fails_ends_in_the_protocols_own_error(
    app: Any, path: str, monkeypatch: pytest.MonkeyPatch
):
    pieces = Service.pieces

    async def failing(self: Service, running: RunningRequest) -> AsyncIterator[Any]:
        left = 3
        async for one in pieces(self, running):
            if not left:
                raise ConnectionError("lost")
            left -= 1
            yield one

    monkeypatch.setattr(Service, "pieces", failing)
    own = {"input": TURNS} if path == RESPONSES else {"messages": TURNS, "max_tokens": 90}
    *before, last = events(app, path, SAME | own)
    failed = last["response"]["error"] if path == RESPONSES else last["error"]
    assert last["type"] == ("response.failed" if path == RESPONSES else "error")
    assert "the server failed on this request" in failed["message"]
    deltas = [event for event in before if event["type"].endswith(("_text.delta", "_block_delta"))]
    assert 1 <= len(deltas) <= 3


def test_a_body_is_measured_as_it_was_sent():
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    try:
        app = create_app(service, rules, body_limit=300)
        body = {"messages": TURNS, "max_tokens": 2, "stop_sequences": ["é" * 60]}
        content = json.dumps(body, ensure_ascii=False).encode()
        assert len(content) < 300 < len(json.dumps(body))
        assert read(request(app, MESSAGES, content))[0] == 200
    finally:
        service.engine.stop()
