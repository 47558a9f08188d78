"""Answers that follow a JSON schema, beside others in the batch, at every λ."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoTokenizer

from asgi import exchange, read, request
from flexalign import _packages
from flexalign.errors import ConfigError
from flexalign.models.loading import load_tokenizer
from flexalign.serving.engine.grammar import GrammarCompiler

pytest.importorskip("llguidance", reason="llguidance is not installed (flexalign[grammar])")

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TURNS = [{"role": "user", "content": "one and two"}]
UNTHINKING = {"logit_bias": {"4": -100}}
"""Keeps a random model from opening a thinking, which it would hardly ever end."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    word: Literal["six", "seven", "é"]
    count: int = Field(ge=0, le=99)


class Sum(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    parts: list[Part] = Field(min_length=1, max_length=2)
    done: bool


def form(schema: Any, name: str = "sum") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


SUM = {"response_format": form(Sum.model_json_schema())}
PART = {"response_format": form(Part.model_json_schema())}


@pytest.fixture
def pair_app(
    serve_here: Callable[..., Any], hybrid_folder: Path, tiny_pair: Any, tmp_path: Path
) -> Any:
    """Two random models, whose prompt has closed the thinking: they would think without an end."""
    aligned = shutil.copytree(tiny_pair.aligned, tmp_path / "aligned")
    AutoTokenizer.from_pretrained(hybrid_folder).save_pretrained(aligned)
    closed = {"enable_thinking": False}
    return serve_here(hybrid_folder, aligned=str(aligned), template=closed, name="m")


def ask(app: Any, path: str = CHAT, **body: Any) -> tuple[int, dict[str, Any]]:
    status, content = read(request(app, path, body))
    return status, json.loads(content)


def content_of(answer: dict[str, Any]) -> str:
    assert answer["choices"][0]["finish_reason"] == "stop"
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_an_answer_follows_the_schema(pair_app: Any, lam: float) -> None:
    found = set()
    for temperature, seed in ((0, 0), (0, 1), (1.5, 2), (1.5, 3)):
        body = {"messages": TURNS, "seed": seed, "temperature": temperature, "lambda": lam}
        status, answer = ask(pair_app, **body, **PART, **UNTHINKING)
        assert status == 200
        Part.model_validate_json(content_of(answer))
        found.add(content_of(answer))
    assert len(found) == 3


def test_rows_of_a_batch_follow_their_own_schemas(pair_app: Any) -> None:
    """Others in the batch, with and without a schema, at other λ, change nothing."""
    asked = [
        {"messages": TURNS, "seed": 1, "lambda": lam, "max_tokens": 200, **UNTHINKING, **own}
        for lam in (0.0, 0.5, 1.0)
        for own in (SUM | {"max_tokens": 40}, PART, {"max_tokens": 20})
    ]

    async def together() -> list[Any]:
        return await asyncio.gather(*(exchange(pair_app, CHAT, body) for body in asked))

    for body, sent in zip(asked, asyncio.run(together()), strict=True):
        answer = json.loads(read(sent)[1])
        _, alone = ask(pair_app, **body)
        assert answer["choices"] == alone["choices"]
        if body.get("response_format") == PART["response_format"]:
            Part.model_validate_json(content_of(answer))


@pytest.mark.parametrize("policy", ["adaptive", "route"])
def test_a_policy_writes_either_way_by_the_schema(pair_app: Any, policy: str) -> None:
    for threshold in (0.0, 1.0):
        way = {"threshold": threshold} if policy == "adaptive" else {"share": threshold}
        dial = {"lambda": {"policy": policy, **way}}
        _, answer = ask(pair_app, messages=TURNS, seed=2, **dial, **PART, **UNTHINKING)
        Part.model_validate_json(content_of(answer))
        assert answer["dial"]["route"] in ("fast", "slow")


def tokens_of(folder: Path) -> tuple[str, str]:
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["<think>", "</think>"])
    return str(ids[0]), str(ids[1])


def test_the_thinking_is_free(
    serve_here: Callable[..., Any], hybrid_folder: Path, tiny_pair: Any
) -> None:
    opening, closing = tokens_of(hybrid_folder)
    for app in (serve_here(tiny_pair.reference), serve_here(hybrid_folder)):
        # With these biases a model opens its thinking where it may, and ends it at once.
        biased = {"logit_bias": {opening: 50, closing: 100}, "temperature": 0}
        _, answer = ask(app, messages=TURNS, **biased, **PART)
        Part.model_validate_json(content_of(answer))
        _, free = ask(app, messages=TURNS, **biased, max_tokens=4)
        assert free["usage"]["completion_tokens"] == 4

    app = serve_here(hybrid_folder)
    _, answer = ask(app, messages=TURNS, max_tokens=30, **PART)
    message = answer["choices"][0]["message"]
    assert message["reasoning"]  # it never closes it, and no token may end the answer there
    assert answer["choices"][0]["finish_reason"] == "length"
    closed = {"chat_template_kwargs": {"enable_thinking": False}}
    _, answer = ask(app, messages=TURNS, **closed, **PART, **UNTHINKING)
    Part.model_validate_json(content_of(answer))


def test_any_object_is_json(pair_app: Any) -> None:
    form = {"response_format": {"type": "json_object"}}
    _, answer = ask(pair_app, messages=TURNS, max_tokens=60, seed=4, **form, **UNTHINKING)
    content = answer["choices"][0]["message"]["content"]
    assert content.strip().startswith("{")
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(content), dict)


def test_the_other_protocols_ask_for_a_schema_in_their_own_way(pair_app: Any) -> None:
    schema = Part.model_json_schema()
    text = {"format": {"type": "json_schema", "name": "part", "schema": schema}}
    _, answer = ask(pair_app, RESPONSES, input="one", text=text, **UNTHINKING)
    Part.model_validate_json(answer["output"][-1]["content"][0]["text"])
    config: dict[str, Any] = {"format": {"type": "json_schema", "schema": schema}}
    asked = {"messages": TURNS, "max_tokens": 200, "output_config": config, **UNTHINKING}
    _, answer = ask(pair_app, MESSAGES, **asked)
    Part.model_validate_json(answer["content"][-1]["text"])


def test_openais_client_parses_answers(pair_app: Any) -> None:
    async def run() -> tuple[Any, str]:
        transport = httpx2.ASGITransport(app=pair_app)
        http = httpx2.AsyncClient(transport=transport, base_url="http://localhost")
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="-", http_client=http)
        turns: Any = TURNS
        name = (await client.models.list()).data[0].id
        asked: Any = {"model": name, "messages": turns, "seed": 3, **UNTHINKING}
        parsed = await client.chat.completions.parse(**asked, response_format=Sum)
        async with client.chat.completions.stream(**asked, response_format=Sum) as stream:
            final = await stream.get_final_completion()
        return parsed.choices[0].message.parsed, final.choices[0].message.parsed

    whole, streamed = asyncio.run(run())
    assert isinstance(whole, Sum)
    assert streamed == whole


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"type": "yaml"}, "response_format must be"),
        (3, "response_format must be"),
        ({"type": "json_schema"}, "response_format must be"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format must be"),
        (form({"type": "objec"}), "cannot be followed (Invalid type: objec); change it."),
        (form({"not": {"type": "integer"}}), 'Unimplemented keys: ["not"]'),
        (form({"$ref": "http://localhost/a"}), "is not present"),
        (form({"type": "string", "pattern": "(?=a)"}), "cannot be followed"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_said(pair_app: Any, given: Any, says: str) -> None:
    status, answer = ask(pair_app, messages=TURNS, response_format=given)
    assert (status, answer["error"]["param"]) == (400, "response_format")
    assert says in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_a_schema_and_tools_are_one_too_many(pair_app: Any) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    status, answer = ask(pair_app, messages=TURNS, tools=[tool], **PART)
    assert (status, answer["error"]["param"]) == (400, "response_format")


def test_a_tokenizer_that_the_library_cannot_read_is_said(serve_here: Callable[..., Any]) -> None:
    status, answer = ask(serve_here("miniature"), messages=TURNS, **PART)
    assert (status, answer["error"]["param"]) == (400, "response_format")


def test_without_the_library_the_way_to_get_it_is_said(
    pair_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_packages.importlib.util, "find_spec", lambda name: None)
    status, answer = ask(pair_app, messages=TURNS, **PART)
    assert status == 400
    assert "pip install 'flexalign[grammar]'" in answer["error"]["message"]


def test_a_tokenizer_of_another_kind_is_refused_by_name() -> None:
    tokenizer = load_tokenizer("miniature")
    compiler = GrammarCompiler(tokenizer, None, [tokenizer.eos_token_id])
    said = (
        "this model's tokenizer cannot follow a schema: .*; serve a model with a tokenizer of the"
    )
    with pytest.raises(ConfigError, match=said):
        compiler.compile({"type": "object"})
