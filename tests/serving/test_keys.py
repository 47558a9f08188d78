"""Keys of a body that a server does not know: refused by name, or named in a header, on every route."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from asgi import read, request
from flexalign.serving.app import create_app
from flexalign.serving.errors import ApiError
from flexalign.serving.keys import BodyKeys, ignored_value
from flexalign.serving.server import ServeOptions, load_service
from flexalign.serving.vllm.folder import prepare_folder
from flexalign.serving.vllm.middleware import FrontOptions, build_front, engine_keys

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TURNS = [{"role": "user", "content": "1+2?"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TURNS, "max_tokens": 2},
    COMPLETION: {"prompt": "1+2?", "max_tokens": 2},
    RESPONSES: {"input": "1+2?", "max_output_tokens": 2},
    MESSAGES: {"messages": TURNS, "max_tokens": 2},
}
HOSTILE = ["a\r\nset-cookie: b", "é", "\u0000", ",", "", "k" * 3000, "λ\u2028"]


class Inner(BaseModel):
    include_usage: bool = False


class Form(BaseModel):
    model_config = ConfigDict(extra="allow")

    messages: list[Any] = []
    prompt: str = ""
    temperature: float = 1
    max_tokens: int | None = None
    schema_: str = Field("", alias="schema")
    stream_options: Inner | None = None


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    yield service, rules
    service.engine.stop()


@pytest.fixture(scope="module")
def strict(service: Any) -> Any:
    return create_app(*service)


@pytest.fixture(scope="module")
def lenient(service: Any) -> Any:
    return create_app(*service, warns_unknown=True)


def ask(app: Any, path: str, **body: Any) -> tuple[int, dict[str, Any], str]:
    """Return the status, the answer and what its header says to have had no effect."""
    sent = request(app, path, body)
    headers = {name.lower(): value for name, value in sent[0]["headers"]}
    status, content = read(sent)
    return status, json.loads(content), headers.get(b"x-flexalign-ignored", b"").decode()


def test_a_form_knows_its_names_aliases_and_what_is_inside() -> None:
    keys = BodyKeys.of(Form, {"user"}, refuses=False)
    body = {"messages": [], "user": "a", "schema": "", "nothing": None, "temprature": 1}
    body["stream_options"] = {"include_usage": True, "often": 1}
    assert keys.sort_out(body) == ("temprature", "stream_options.often")
    assert body.keys() == {"messages", "user", "schema", "nothing", "stream_options"}
    assert body["stream_options"] == {"include_usage": True}
    assert keys.sort_out(body) == ()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"temprature": 1},
            "'temprature' is not known to this server; did you mean 'temperature'?",
        ),
        ({"zzz": 1}, "'zzz' is not known to this server; leave it out."),
        (
            {"stream_options": {"include_usages": 1}},
            "'stream_options.include_usages' is not known to this server; did you mean "
            "'stream_options.include_usage'?",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        BodyKeys.of(Form).sort_out(body)
    assert refused.value.message == message
    assert refused.value.param == next(iter(body))


def test_a_header_takes_any_key_and_not_too_many() -> None:
    assert ignored_value(["text.verbosity", "b"]) == "text.verbosity, b"
    hostile = ignored_value(HOSTILE)
    assert hostile.isascii()
    assert hostile.isprintable()
    assert len(hostile) < 200
    assert ignored_value([str(n) for n in range(40)]).endswith("15, and 24 more")


@pytest.mark.parametrize(
    ("path", "given", "meant"),
    [
        (CHAT, "repetition_penalti", "repetition_penalty"),
        (CHAT, "max_completions_tokens", "max_completion_tokens"),
        (COMPLETION, "promt", "prompt"),
        (RESPONSES, "max_output_token", "max_output_tokens"),
        (RESPONSES, "instruction", "instructions"),
        (RESPONSES, "temprature", "temperature"),
        (MESSAGES, "stop_sequence", "stop_sequences"),
        (MESSAGES, "sistem", "system"),
        (MESSAGES, "lamda", "lambda"),
    ],
)
def test_every_route_names_its_own_nearest_key(
    strict: Any, path: str, given: str, meant: str
) -> None:
    status, answer, _ = ask(strict, path, **BODIES[path], **{given: "a"})
    assert status == 400
    assert f"{given!r} is" in answer["error"]["message"]
    assert answer["error"]["message"].endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize("path", BODIES)
def test_the_operator_may_have_them_named_in_a_header(lenient: Any, strict: Any, path: str) -> None:
    known = BODIES[path] | {"temperature": 0, "seed": 1}
    _, expected, nothing = ask(strict, path, **known)
    status, answer, ignored = ask(lenient, path, **known, zzz=[1], **dict.fromkeys(HOSTILE, 1))
    assert (status, nothing) == (200, "")
    assert ignored.startswith("zzz, a??set-cookie:?b, ?")
    volatile = {"id", "created", "created_at", "output", "model", "temperature"}
    if path in (CHAT, COMPLETION):
        assert answer["choices"] == expected["choices"]
    assert {k: v for k, v in answer.items() if k not in volatile} == {
        k: v for k, v in expected.items() if k not in volatile
    }


def test_what_is_known_and_not_served_stays_an_error(lenient: Any) -> None:
    for body in ({"echo": True}, {"lamda": 0.5}, {"extra_body": {"a": 1}}, {"temperature": "a"}):
        status, answer, _ = ask(lenient, COMPLETION, **BODIES[COMPLETION], **body)
        assert (status, answer["error"]["param"]) == (400, next(iter(body)))


def test_inner_keys_that_another_protocol_does_not_read_are_named(strict: Any) -> None:
    _, _, ignored = ask(
        strict,
        RESPONSES,
        **BODIES[RESPONSES],
        text={"verbosity": "low"},
        reasoning={"summary": "auto", "a\nb": 1},
    )
    assert ignored == "reasoning.summary, reasoning.a?b, text.verbosity"
    _, _, ignored = ask(strict, MESSAGES, **BODIES[MESSAGES], output_config={"tone": "dry"})
    assert ignored == "output_config.tone"


# Before vLLM.


def engine(heard: list[dict[str, Any]]) -> FastAPI:
    """A server that takes any key, as vLLM does."""
    app = FastAPI()

    async def answer(form: Form, raw: Request) -> dict[str, Any]:
        heard.append(await raw.json())
        choice = {"index": 0, "message": {"role": "assistant", "content": "3"}, "text": "3"}
        choice |= {"finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return {"id": "c", "object": "o", "created": 1, "choices": [choice], "usage": usage}

    router = APIRouter()
    for path in (CHAT, COMPLETION):
        router.post(path)(answer)
    app.include_router(router)
    return app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("folder")
    yield prepare_folder("miniature", "miniature:fast", folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("path", BODIES)
def test_before_vllm_they_are_refused_or_named(folder: Path, path: str) -> None:
    heard: list[dict[str, Any]] = []
    app = engine(heard)

    def front(*, refuses: bool) -> Any:
        keys = engine_keys(app.routes, refuses=refuses)
        return build_front(app, folder, FrontOptions(), None, keys)

    body = {key: value for key, value in BODIES[path].items() if key != "max_output_tokens"}
    asked = body | {"temprature": 1}
    status, answer, _ = ask(front(refuses=True), path, **asked)
    assert status == 400
    assert answer["error"]["message"].endswith("did you mean 'temperature'?")
    assert heard == []

    status, _, ignored = ask(front(refuses=False), path, **asked)
    assert (status, ignored) == (200, "temprature")
    assert "temprature" not in heard[-1]
    assert ask(front(refuses=True), path, **body, temperature=1, user="a")[0] == 200


def test_an_engine_whose_keys_are_not_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert engine_keys([], refuses=True) == {}
    assert "the keys of /v1/completions are not known" in caplog.text
