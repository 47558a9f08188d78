"""The dial and the key in front of an application that knows neither."""

import asyncio
import json
from typing import Any

import pytest

from asgi import request
from flexalign.lambdas import Fixed
from flexalign.serving.dial import DialRules
from flexalign.serving.middleware import CHOICE, DialMiddleware, KeyGate

RULES = DialRules(Fixed(0.5), (0.0, 1.0))
TOLD = {"lambda": 0.25, "policy": "fixed", "route": None}


class Engine:
    """An application that answers with fixed bytes and remembers what it was given."""

    def __init__(self, *parts: bytes, kind: bytes = b"application/json", status: int = 200) -> None:
        self.parts, self.kind, self.status = parts, kind, status
        self.body: Any = None
        self.scope: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        if scope["method"] == "POST":
            message = await receive()
            self.body = json.loads(message["body"])
            assert message["more_body"] is False
            if CHOICE in scope:
                length = str(len(message["body"])).encode()
                assert dict(scope["headers"])[b"content-length"] == length
        headers = [(b"content-type", self.kind), (b"content-length", b"7")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for place, part in enumerate(self.parts):
            more = place < len(self.parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})


def ask(
    app: Any, *content: bytes, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, str], list[bytes]]:
    """Send a request whose body comes in these parts; return status, headers, bodies."""
    method = "POST" if content else "GET"
    headers = {"content-type": "application/json"} | headers
    encoded = [(k.encode(), v.encode()) for k, v in headers.items()]
    sent = request(app, path, content or b"", method=method, headers=encoded, leaves_after=0)
    if not sent:
        return 0, {}, []
    told = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], told, [message["body"] for message in sent[1:]]


def body(**values: Any) -> bytes:
    return json.dumps({"messages": [], **values}).encode()


def test_the_dial_goes_in_and_comes_back():
    engine = Engine(b'{"id": 1,', b' "choices": []}')
    status, headers, parts = ask(DialMiddleware(engine, RULES), body(**{"lambda": 0.25}))
    assert status == 200
    assert json.loads(b"".join(parts)) == {"id": 1, "choices": [], "dial": TOLD}
    assert int(headers["content-length"]) == len(b"".join(parts))
    assert engine.body == {"messages": []}
    assert engine.scope[CHOICE].dial == Fixed(0.25)


def test_a_body_in_parts_is_one_body():
    engine = Engine(b"{}")
    content = body(**{"lambda": 0.25})
    ask(DialMiddleware(engine, RULES), content[:5], content[5:9], content[9:])
    assert engine.scope[CHOICE].dial == Fixed(0.25)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_tells_the_dial_where_it_begins_and_ends(size: int):
    def chunk(finish: str | None) -> dict[str, Any]:
        return {"choices": [{"delta": {"content": "é"}, "finish_reason": finish}]}

    usage = {"choices": [], "usage": {"total_tokens": 3}}
    values = [chunk(None), chunk(None), chunk("stop"), usage]
    stream = b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)
    stream = b": ping\n\n" + stream + b"data: [DONE]\n\n"
    parts = [stream[i : i + size] for i in range(0, len(stream), size)]
    engine = Engine(*parts, b"", kind=b"text/event-stream; charset=utf-8")
    _, _, sent = ask(DialMiddleware(engine, RULES), body(**{"lambda": 0.25}))
    events = b"".join(sent).split(b"\n\n")
    assert [events[0], *events[-2:]] == [b": ping", b"data: [DONE]", b""]
    told = [json.loads(one.removeprefix(b"data: ")) for one in events[1:-2]]
    assert [one.pop("dial", None) for one in told] == [TOLD, None, TOLD, TOLD]
    assert told == values


def test_a_stream_that_breaks_off_is_passed_on_to_its_last_byte():
    value = {"choices": [{"delta": {"content": "é"}, "finish_reason": None}]}
    event = b"data: " + json.dumps(value).encode()
    engine = Engine(event + b"\n\n", event, kind=b"text/event-stream")
    _, _, sent = ask(DialMiddleware(engine, RULES), body(**{"lambda": 0.25}))
    events = b"".join(sent).split(b"\n\n")
    told = [json.loads(one.removeprefix(b"data: ")) for one in events if one]
    assert [one.pop("dial", None) for one in told] == [TOLD, None]
    assert told == [value, value]


def test_what_was_ignored_is_said_in_a_header():
    _, headers, _ = ask(DialMiddleware(Engine(b"{}"), RULES), body(reasoning_effort="low"))
    assert headers["x-flexalign-ignored"] == "reasoning_effort"


def test_an_error_of_the_engine_passes_as_it_is():
    engine = Engine(b'{"error": {}}', status=400)
    status, _, parts = ask(DialMiddleware(engine, RULES), body())
    assert (status, parts) == (400, [b'{"error": {}}'])


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'"lambda"', 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"messages": "\\ud800"}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"a": ' * 50_000, 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"lambda": NaN}', 400, "invalid_dial"),
        (b'{"lambda": 0.1, "effort": 3}', 400, "invalid_dial"),
        (b" " * 2_000_000, 413, "body_too_large"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_body_never_reaches_the_engine(content: bytes, status: int, code: str):
    engine = Engine(b"{}")
    answer = ask(DialMiddleware(engine, RULES, body_limit=1_000_000), content)
    error = json.loads(answer[2][0])["error"]
    assert (answer[0], error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert engine.scope is None


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain; a=application/json", 415),
        ("", 415),
    ],
)
def test_a_body_that_a_page_may_send_unasked_is_refused(kind: str, status: int):
    app = DialMiddleware(Engine(b"{}"), RULES)
    told, _, parts = ask(app, body(), **{"content-type": kind})
    assert told == status
    if status == 415:
        error = json.loads(parts[0])["error"]
        assert error["code"] == "invalid_content_type"
        assert "-H 'content-type: application/json'" in error["message"]


def test_a_body_that_is_announced_far_too_long_is_not_read():
    app = DialMiddleware(Engine(b"{}"), RULES, body_limit=1000)
    status, headers, _ = ask(app, b"{}", **{"content-length": "16001"})
    assert (status, headers["connection"]) == (413, "close")


def test_a_body_over_the_limit_is_heard_out_so_that_its_sender_hears_the_reason():
    parts = [b" " * 600] * 5
    heard = []

    async def receive() -> Any:
        heard.append(parts.pop())
        return {"type": "http.request", "body": heard[-1], "more_body": bool(parts)}

    async def send(message: Any) -> None:
        heard.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    app = DialMiddleware(Engine(b"{}"), RULES, body_limit=1000)
    asyncio.run(app(scope, receive, send))
    assert heard[:6] == [b" " * 600] * 5 + [413]


def test_a_client_that_leaves_before_its_body_is_whole_gets_nothing():
    app = DialMiddleware(Engine(b"{}"), RULES)
    assert request(app, "/v1/completions", (), leaves_after=0) == []


def test_other_paths_pass():
    engine = Engine(b"[1]")
    assert ask(DialMiddleware(engine, RULES), path="/v1/models")[2] == [b"[1]"]
    assert ask(DialMiddleware(engine, RULES), b"[]", path="/tokenize")[2] == [b"[1]"]


@pytest.mark.parametrize("header", [None, "", "secret", "Bearer", "Bearer wrong", "bearer secret"])
def test_a_wrong_key_is_refused(header: str | None):
    engine = Engine(b"{}")
    headers = {} if header is None else {"authorization": header}
    status, told, parts = ask(KeyGate(engine, "secret"), path="/v1/models", **headers)
    assert (status, told["www-authenticate"]) == (401, "Bearer")
    assert json.loads(parts[0])["error"]["code"] == "invalid_api_key"
    assert engine.scope is None


def test_whatever_is_posted_needs_the_key():
    gate = KeyGate(Engine(b"{}"), "secret")
    assert ask(gate, b"{}", path="/invocations")[0] == 401
    assert ask(gate, b"{}", path="/invocations", authorization="Bearer secret")[0] == 200


def test_the_right_key_and_the_health_check_pass():
    gate = KeyGate(Engine(b"{}"), "secret")
    assert ask(gate, path="/v1/models", authorization="Bearer secret")[0] == 200
    assert ask(gate, path="/health")[0] == 200
