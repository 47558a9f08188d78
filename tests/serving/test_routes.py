"""What a route does with a request: read once, answered once, and described at ``/docs``."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from asgi import read, request
from flexalign.lambdas import Fixed
from flexalign.serving.app import create_app
from flexalign.serving.dial import DIAL_KEYS, EFFORT_LEVELS, DialRules
from flexalign.serving.server import ServeOptions, load_service

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASKED = {"messages": [{"role": "user", "content": "3+14+15?"}], "max_tokens": 6, "seed": 3}
OTHER_PROTOCOLS = [
    ("/v1/responses", {"input": "3+14+15?", "max_output_tokens": 6, "seed": 3}),
    ("/v1/messages", ASKED),
]


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    yield create_app(service, rules)
    service.engine.stop()


class Counts:
    """How often JSON was parsed and written, whoever asked for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.parsed = self.written = 0
        decode, encode = json.JSONDecoder.decode, json.JSONEncoder.encode

        def counted_decode(*given: Any, **more: Any) -> Any:
            self.parsed += 1
            return decode(*given, **more)

        def counted_encode(*given: Any, **more: Any) -> str:
            self.written += 1
            return encode(*given, **more)

        patch.setattr(json.JSONDecoder, "decode", counted_decode)
        patch.setattr(json.JSONEncoder, "encode", counted_encode)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.mark.parametrize("dial", [{"lambda": 0.5}, {"lambda": "auto"}, {"reasoning_effort": "low"}])
def test_a_chat_is_parsed_once_and_its_answer_written_once(
    app: Any, counts: Counts, dial: dict[str, Any]
):
    body = json.dumps(ASKED | dial).encode()
    counts.written = 0
    status, content = read(request(app, CHAT, body))
    assert (status, counts.parsed, counts.written) == (200, 1, 1)
    assert json.loads(content)["dial"]["policy"] in ("fixed", "adaptive")


def test_a_streamed_chat_is_parsed_once_and_each_event_written_once(app: Any, counts: Counts):
    more = {"lambda": 0.5, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(ASKED | more).encode()
    counts.written = 0
    status, content = read(request(app, CHAT, body))
    *events, done, rest = content.split(b"\n\n")
    assert (status, done, rest) == (200, b"data: [DONE]", b"")
    assert (counts.parsed, counts.written) == (1, len(events))
    assert len(events) > 3


@pytest.mark.parametrize(("path", "asked"), OTHER_PROTOCOLS)
def test_another_protocol_is_parsed_once_and_its_answer_written_once(
    app: Any, counts: Counts, path: str, asked: dict[str, Any]
):
    body = json.dumps(asked | {"lambda": 0.5}).encode()
    counts.written = 0
    status, content = read(request(app, path, body))
    assert (status, counts.parsed, counts.written) == (200, 1, 1)
    assert json.loads(content)["dial"]["lambda"] == 0.5


@pytest.mark.parametrize(("path", "asked"), OTHER_PROTOCOLS)
def test_a_stream_of_another_protocol_is_parsed_once_and_each_event_written_once(
    app: Any, counts: Counts, path: str, asked: dict[str, Any]
):
    body = json.dumps(asked | {"lambda": 0.5, "stream": True}).encode()
    counts.written = 0
    status, content = read(request(app, path, body))
    *events, rest = content.split(b"\n\n")
    assert (status, rest) == (200, b"")
    assert (counts.parsed, counts.written) == (1, len(events))
    assert len(events) > 6


@pytest.mark.parametrize(("path", "asked"), OTHER_PROTOCOLS)
def test_an_error_of_another_protocol_is_written_once(
    app: Any, counts: Counts, path: str, asked: dict[str, Any]
):
    body = json.dumps(asked | {"model": "other"}).encode()
    counts.written = 0
    status, content = read(request(app, path, body))
    assert (status, counts.parsed, counts.written) == (404, 1, 1)
    assert "there is no model 'other' here" in json.loads(content)["error"]["message"]


def test_a_dial_is_parsed_once(app: Any, monkeypatch: pytest.MonkeyPatch):
    parsed = []
    check = Fixed.__post_init__

    def counted(self: Fixed) -> None:
        parsed.append(self.lam)
        check(self)

    monkeypatch.setattr(Fixed, "__post_init__", counted)
    assert read(request(app, CHAT, ASKED | {"lambda": 0.5}))[0] == 200
    assert parsed == [0.5]


def test_what_was_ignored_is_said_beside_an_error_too(app: Any):
    sent = request(app, CHAT, ASKED | {"reasoning_effort": "low", "n": 0})
    assert read(sent)[0] == 400
    assert dict(sent[0]["headers"])[b"x-flexalign-ignored"] == b"reasoning_effort"


@pytest.mark.parametrize(
    ("path", "body", "method"),
    [
        (CHAT, ASKED, "POST"),
        (CHAT, ASKED | {"stream": True}, "POST"),
        (CHAT, {}, "POST"),
        ("/nowhere", b"", "GET"),
        ("/health", b"", "GET"),
    ],
)
def test_every_answer_has_an_id(app: Any, path: str, body: Any, method: str):
    def id_of(*headers: tuple[bytes, bytes]) -> bytes:
        sent = request(app, path, body, method=method, headers=headers)
        (named,) = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
        return named

    assert id_of((b"x-request-id", b"mine-7")) == b"mine-7"
    made = {id_of() for _ in range(3)}
    assert len(made) == 3
    # What could break a header, or fill a log, is not echoed.
    for unsafe in (b"", b"a b", b"a\r\nx: y", b"\xe9", b"x" * 129):
        assert id_of((b"x-request-id", unsafe)).startswith(b"req_")


def test_a_client_that_leaves_before_its_body_is_whole_gets_nothing(app: Any):
    assert request(app, CHAT, (), leaves_after=0) == []


def test_a_probe_may_ask_by_head(app: Any):
    assert request(app, "/health", method="HEAD")[0]["status"] == 200


def test_the_docs_show_the_dial_and_what_it_takes(app: Any):
    assert b"/openapi.json" in read(request(app, "/docs", method="GET"))[1]
    paths = json.loads(read(request(app, "/openapi.json", method="GET"))[1])["paths"]
    for path, own in ((CHAT, "messages"), (COMPLETION, "prompt")):
        form = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert form["required"] == [own]
        shown = form["properties"]
        assert set(DIAL_KEYS) < set(shown)
        assert shown["reasoning_effort"]["enum"] == list(EFFORT_LEVELS)
        assert shown["lambda"]["anyOf"] == shown["control"]["anyOf"]
        assert (shown["temperature"]["minimum"], shown["temperature"]["maximum"]) == (0, 2)
        assert "$ref" not in json.dumps(form)


def test_every_example_of_a_dial_in_the_docs_is_taken(app: Any):
    paths = json.loads(read(request(app, "/openapi.json", method="GET"))[1])["paths"]
    [content] = paths[CHAT]["post"]["requestBody"]["content"].values()
    rules = DialRules(Fixed(0.0))
    examples = content["schema"]["properties"]["lambda"]["examples"]
    assert len({type(rules.choose({"lambda": value}).dial) for value in examples}) == 5
