"""A thousand hostile bodies: each is served or refused with a reason, and the next good one served."""

import asyncio
import http.client
import json
import random
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import qwen3_template

from asgi import exchange, read
from flexalign.serving.app import create_app
from flexalign.serving.server import ServeOptions, load_service
from server_process import KEY, Server

PATHS = ("/v1/chat/completions", "/v1/completions")
BODIES = 1000

GOOD: dict[str, dict[str, Any]] = {
    PATHS[0]: {"messages": [{"role": "user", "content": "1+2?"}], "max_tokens": 2},
    PATHS[1]: {"prompt": "1+2?", "max_tokens": 2},
}
FACADES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "1+2?", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "1+2?"}], "max_tokens": 2},
}
KEYS = [
    *("messages", "prompt", "model", "max_tokens", "max_completion_tokens", "n", "seed", "stop"),
    *("temperature", "top_p", "stream", "stream_options", "logprobs", "top_logprobs", "user"),
    *("lambda", "effort", "reasoning_effort", "control", "tools", "logit_bias", "metadata"),
    *("echo", "response_format", "frequency_penalty", "lamda", "λ", "", "\u0000", "a" * 3000),
    *("chat_template_kwargs", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
]
FACADE_KEYS = [
    *("input", "instructions", "max_output_tokens", "reasoning", "text", "store", "system"),
    *("stop_sequences", "output_config", "thinking", "include", "messages", "top_k"),
]
INNER = ["role", "content", "type", "text", "policy", "kind", "start", "end", "steps", "points"]
INNER += ["threshold", "share", "measure", "think", "answer", "budget", "include_usage", "lambda"]
INNER += ["enable_thinking", "drop_system", "summary", "verbosity", "a\r\nb: c"]
LEAVES = [
    *(None, True, False, -1, 0, 1, 2, 7, 2.5, -0.0, 1e308, 5e-324, 10**18, 2**63, 2**64, 10**300),
    *("", " ", "auto", "user", "assistant", "system", "linear", "thinking", "adaptive", "route"),
    *("1+2?", "none", "max", "é\u0000\u202e", "\U0001f600" * 50, "\ufeff", "</think>", "<eos>"),
    *("1+" * 2000, "a" * 20_000, "{{ 7 * 7 }}", "%s%n", "../../etc/passwd"),
]
RAW = [
    b"",
    b"\x00",
    b"null",
    b"[]",
    b'"a"',
    b"{",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "1", "max_tokens": 2, "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "1", "max_tokens": 2, "lambda": NaN}',
    b'{"prompt": "1", "max_tokens": 2, "temperature": -Infinity}',
    b'{"prompt": "1", "max_tokens": 2, "lambda": 1e999}',
    b'{"prompt": "1", "prompt": 2, "max_tokens": 2}',
    '{"prompt": "1", "max_tokens": 2}'.encode("utf-16"),
    b'\xef\xbb\xbf{"prompt": "1"}',
]


def any_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if depth > 3 or kind < 0.6:
        return draw.choice(LEAVES)
    if kind < 0.8:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(INNER): any_value(draw, depth + 1) for _ in range(draw.randrange(5))}


KEYWORDS = [
    *("type", "properties", "items", "enum", "const", "required", "additionalProperties", "a"),
    *("anyOf", "allOf", "$ref", "$defs", "pattern", "minimum", "maxLength", "minItems", "format"),
    *("function", "name", "parameters", "arguments", "x-guidance", "lenient", "not"),
]
WORDS = [*LEAVES, *("object", "string", "integer", "array", "#/$defs/a", "(a+)+$", "(?=a)", "date")]


def any_schema(draw: random.Random, depth: int = 0) -> Any:
    """Return a value that looks like a JSON schema, or like a tool with one."""
    kind = draw.random()
    if depth > 4 or kind < 0.3:
        return draw.choice(WORDS)
    if kind < 0.45:
        return [any_schema(draw, depth + 1) for _ in range(draw.randrange(4))]
    made = {draw.choice(KEYWORDS): any_schema(draw, depth + 1) for _ in range(draw.randrange(5))}
    return made | ({"type": draw.choice(["object", "string", "array"])} if kind > 0.7 else {})


def nested(draw: random.Random) -> bytes:
    """Nested as deep as a parser's stack, give or take, where a value is read, compared or told."""
    depth = int(draw.choice((50, 300, 800, 940, 960, 980, 1000, 20_000)) * draw.uniform(0.97, 1.03))
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    key = draw.choice(KEYS[:20]).encode()
    deep = opening * depth + b"1" + closing * depth
    return b'{"prompt": "1", "max_tokens": 2, "' + key + b'": ' + deep + b"}"


def path_of(number: int) -> str:
    return PATHS[number // 10 % 2]


def body(number: int, good: dict[str, Any] | None = None, keys: list[str] = KEYS) -> bytes:
    """The same for the same number."""
    draw = random.Random(number)
    good = good or GOOD[path_of(number)]
    kind = number % 10
    if kind == 0:
        return draw.choice(RAW)
    if kind == 1:
        return nested(draw)
    if kind == 2:
        return repr({draw.choice(keys): any_value(draw) for _ in range(6)}).encode()
    if kind == 3:
        whole = json.dumps(good).encode()
        place = draw.randrange(len(whole))
        return whole[:place] + bytes([draw.randrange(256)]) + whole[place + draw.randrange(3) :]
    if kind < 6:
        return json.dumps({draw.choice(keys): any_value(draw) for _ in range(6)}).encode()
    changed = {draw.choice(keys): any_value(draw) for _ in range(draw.randrange(1, 3))}
    return json.dumps(good | changed, ensure_ascii=bool(number % 2)).encode()


def require_sound(number: int, status: int, told: bytes) -> None:
    assert status < 500, (number, body(number)[:500], told)
    if status == 200:
        assert b'"error"' not in told or b'"choices"' in told, (number, told)
    else:
        error = json.loads(told)["error"]
        assert error["message"], number
        assert "tensor" not in error["message"], (number, error)
        assert repr(error["param"] or "")[1:-1] in error["message"], (number, error)


Ask = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]


async def ask_all(ask: Ask) -> dict[int, int]:
    """Ask with every body, sixteen at a time; return how often each status came."""
    gate = asyncio.Semaphore(16)
    statuses: dict[int, int] = {}

    async def one(number: int) -> None:
        async with gate:
            status, told = await ask(path_of(number), body(number))
        require_sound(number, status, told)
        statuses[status] = statuses.get(status, 0) + 1

    await asyncio.gather(*map(one, range(BODIES)))
    return statuses


def require_served(status: int, told: bytes) -> None:
    assert status == 200
    assert json.loads(told)["usage"]["completion_tokens"] == 2


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    yield create_app(service, rules)
    service.engine.stop()


@pytest.mark.slow
def test_no_body_breaks_the_application(app: Any):
    async def ask(path: str, content: bytes) -> tuple[int, bytes]:
        return read(await exchange(app, path, content))

    async def run() -> tuple[dict[int, int], Any]:
        statuses = await ask_all(ask)
        return statuses, await ask(PATHS[1], json.dumps(GOOD[PATHS[1]]).encode())

    statuses, served = asyncio.run(run())
    assert statuses[200] > 30
    assert statuses[400] > 500
    require_served(*served)


@pytest.mark.slow
@pytest.mark.parametrize("path", FACADES)
def test_no_body_breaks_another_protocol(app: Any, path: str):
    async def run() -> dict[int, int]:
        statuses: dict[int, int] = {}
        for number in range(BODIES):
            content = body(number, FACADES[path], KEYS + FACADE_KEYS)
            status, told = read(await exchange(app, path, content))
            assert status < 500, (number, content[:500], told)
            # A stream that has begun tells its failure as an event.
            is_failed = b'"response.failed"' in told or b'"type": "api_error"' in told
            assert not is_failed, (number, content[:500], told)
            assert status == 200 or json.loads(told)["error"]["message"], (number, told)
            statuses[status] = statuses.get(status, 0) + 1
        served = read(await exchange(app, path, json.dumps(FACADES[path]).encode()))
        assert served[0] == 200
        return statuses

    statuses = asyncio.run(run())
    assert statuses[200] > 15
    assert statuses[400] > 500


@pytest.fixture
def lenient(hybrid_folder: Path) -> Iterator[Any]:
    """A model without a dial, whose template takes arguments; unknown keys go into a header."""
    service, rules = load_service(ServeOptions(str(hybrid_folder)))
    yield create_app(service, rules, warns_unknown=True)
    service.engine.stop()


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PATHS, *FACADES])
def test_no_body_breaks_a_template_or_a_header(lenient: Any, path: str):
    good = GOOD.get(path) or FACADES[path]
    keys = [*KEYS, *FACADE_KEYS, *["chat_template_kwargs", "reasoning_effort"] * 8]

    async def run() -> dict[int, int]:
        statuses: dict[int, int] = {}
        for number in range(BODIES):
            content = body(number, good, keys)
            sent = await exchange(lenient, path, content)
            status, told = read(sent)
            assert status < 500, (number, content[:500], told)
            for name, value in sent[0]["headers"]:
                assert re.fullmatch(rb"[\x20-\x7e]*", value), (number, name, value)
            statuses[status] = statuses.get(status, 0) + 1
        assert read(await exchange(lenient, path, json.dumps(good).encode()))[0] == 200
        return statuses

    statuses = asyncio.run(run())
    assert statuses[200] > 15
    assert statuses[400] > 300


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tools", "response_format"])
def test_no_tool_and_no_schema_breaks_the_application(hybrid_folder: Path, key: str):
    if key == "response_format":
        pytest.importorskip("llguidance", reason="llguidance is not installed")
    tokenizer = AutoTokenizer.from_pretrained(hybrid_folder)
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + (
        tokenizer.chat_template
    )
    tokenizer.response_template = qwen3_template
    tokenizer.save_pretrained(hybrid_folder)
    service, rules = load_service(ServeOptions(str(hybrid_folder)))
    app = create_app(service, rules)

    def asked(number: int) -> dict[str, Any]:
        draw = random.Random(number)
        if key == "tools":
            parameters = {"name": draw.choice(["add", "", 3]), "parameters": any_schema(draw)}
            value: Any = [{"type": "function", "function": parameters}, any_schema(draw)]
            value = value[: draw.randrange(1, 3)]
        else:
            value = {"type": "json_schema", "json_schema": {"schema": any_schema(draw)}}
        closed = {"chat_template_kwargs": {"enable_thinking": False}}
        return GOOD[PATHS[0]] | closed | {"max_tokens": 6, key: value}

    async def run() -> dict[int, int]:
        statuses: dict[int, int] = {}
        for number in range(BODIES):
            status, told = read(await exchange(app, PATHS[0], asked(number)))
            require_sound(number, status, told)
            statuses[status] = statuses.get(status, 0) + 1
        return statuses

    try:
        statuses = asyncio.run(run())
    finally:
        service.engine.stop()
    assert statuses[200] > 50
    assert statuses[400] > 200


@pytest.mark.full
def test_no_body_breaks_the_server(server: Server):
    host = server.root.removeprefix("http://")
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}

    def ask(path: str, content: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            connection.request("POST", path, content, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    async def apart(path: str, content: bytes) -> tuple[int, bytes]:
        return await asyncio.to_thread(ask, path, content)

    statuses = asyncio.run(ask_all(apart))
    assert statuses[200] > 30
    assert statuses[400] > 500
    require_served(*ask(PATHS[1], json.dumps(GOOD[PATHS[1]]).encode()))
    assert server.process.poll() is None
