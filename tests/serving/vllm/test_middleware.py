"""What stands before vLLM's server, before an application that answers as vLLM does."""

import asyncio
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
import torch

from asgi import request
from flexalign.errors import CheckpointError, ConfigError
from flexalign.inra.configuration import InRaConfig
from flexalign.lambdas import LAMBDA_LEGEND, Route
from flexalign.models.loading import load_tokenizer
from flexalign.serving.vllm.folder import prepare_folder
from flexalign.serving.vllm.middleware import (
    KEY_VARIABLE,
    VARIABLE,
    Front,
    FrontOptions,
    build_front,
)

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TEXT = ["<think>", " 3 + 4", "</think>", " 7", "<eos>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder("miniature", "miniature:fast", tmp_path_factory.mktemp("folder"))


class Vllm:
    """Answers as vLLM 0.32 does: every token a chunk, the one that ends it counted.

    Attributes:
        bodies: What it was asked.
        written: Tokens it wrote for each request.
        words: The tokens of an answer, the one that ends it included.
        log_probs: Theirs.
    """

    def __init__(
        self, words: list[str] | None = None, log_probs: list[float] | None = None
    ) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.written: list[int] = []
        self.words = words or TEXT
        self.log_probs = log_probs or [-0.1] * len(self.words)
        self.finish, self.stop_reason = "stop", None
        self.prompt = "3+4?"
        self.failure: dict[str, Any] | None = None
        self.status = 400
        self.state = SimpleNamespace(args=SimpleNamespace(model=""))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        if scope["path"] == "/v1/models":
            return await self._whole(send, {"data": [{"id": "m"}]})
        if scope["path"] == "/metrics":
            return await prometheus_client.make_asgi_app()(scope, receive, send)
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        self.written.append(0)
        if scope["path"] not in (CHAT, COMPLETION):
            return await self._whole(send, {"id": "other"})
        if self.failure:
            return await self._whole(send, self.failure, self.status)
        is_chat = scope["path"] == CHAT
        if not body.get("stream"):
            return await self._whole(send, self._answer(body, is_chat))
        kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        gone = asyncio.create_task(receive())
        if is_chat:
            role = {"role": "assistant", "content": ""}
            first = {"index": 0, "delta": role, "logprobs": None, "finish_reason": None}
            await self._event(send, [first], is_chat, prompt_text=self.prompt)
        for place, word in enumerate(self.words):
            await asyncio.sleep(0)
            if gone.done():
                return None
            self.written[-1] += 1
            is_last = place == len(self.words) - 1
            text = "" if is_last and self.stop_reason is None else word
            part = {"index": 0, "logprobs": self._logprobs(body, is_chat, place, place + 1)}
            part |= {"delta": {"content": text}} if is_chat else {"text": text}
            part["finish_reason"] = self.finish if is_last else None
            part |= {"stop_reason": self.stop_reason} if is_last else {}
            await self._event(send, [part], is_chat)
        if (body.get("stream_options") or {}).get("include_usage"):
            await self._event(send, [], is_chat, usage=self._usage())
        gone.cancel()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return None

    def _answer(self, body: Any, is_chat: bool) -> dict[str, Any]:
        text = "".join(self.words[: None if self.stop_reason else -1])
        self.written[-1] = len(self.words)
        choice = {"index": 0, "finish_reason": self.finish, "stop_reason": self.stop_reason}
        choice["logprobs"] = self._logprobs(body, is_chat, 0, len(self.words))
        message = {"role": "assistant", "content": text, "reasoning": None, "tool_calls": []}
        choice |= {"message": message} if is_chat else {"text": text}
        answer = {
            "id": "c",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": self._usage(),
        }
        answer["object"] = "chat.completion" if is_chat else "text_completion"
        return answer | ({"prompt_text": self.prompt} if is_chat else {})

    def _logprobs(self, body: Any, is_chat: bool, start: int, end: int) -> Any:
        words, log_probs = self.words[start:end], self.log_probs[start:end]
        if is_chat and body.get("logprobs"):
            pairs = zip(words, log_probs, strict=True)
            content = [{"token": w, "logprob": p, "top_logprobs": []} for w, p in pairs]
            return {"content": content}
        if not is_chat and body.get("logprobs") is not None:
            return {"tokens": words, "token_logprobs": log_probs, "top_logprobs": None}
        return None

    def _usage(self) -> dict[str, Any]:
        count = len(self.words)
        return {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}

    async def _event(self, send: Any, choices: Any, is_chat: bool, **more: Any) -> None:
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        chunk = {"id": "c", "object": kind, "created": 1, "model": "m", "choices": choices, **more}
        content = f"data: {json.dumps(chunk)}\n\n".encode()
        await send({"type": "http.response.body", "body": content, "more_body": True})

    async def _whole(self, send: Any, value: Any, status: int = 200) -> None:
        kind = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": kind})
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})


def ask(
    app: Any, path: str = CHAT, method: str = "POST", key: str = "", host: str = "x", **body: Any
) -> Any:
    """Return the status, and the object or the chunks of the stream."""
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"host", host.encode())]
    sent = request(app, path, body, method=method, headers=headers)
    content = b"".join(message["body"] for message in sent[1:]).decode()
    if not content.startswith("data: "):
        return sent[0]["status"], json.loads(content)
    *events, done, rest = content.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return sent[0]["status"], [json.loads(event.removeprefix("data: ")) for event in events]


def before(vllm: Vllm, folder: Path, key: str | None = None, **options: Any) -> Any:
    return build_front(vllm, folder, FrontOptions(**options), key)


def xargs(value: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"lambda": value}}


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({}, 0.0),
        ({"lambda": 0.25}, 0.25),
        ({"control": 1}, 1.0),
        ({"reasoning_effort": "low"}, 0.0),
        ({"lambda": {"kind": "constant", "start": 0.5}}, 0.5),
    ],
)
def test_a_dial_reaches_the_engine_as_a_number(folder: Path, given: Any, value: float):
    vllm = Vllm()
    status, answer = ask(before(vllm, folder), messages=[], seed=3, **given)
    expected = {"messages": [], "seed": 3, "return_prompt_text": True, **xargs(value)}
    assert (status, vllm.bodies) == (200, [expected])
    assert answer["dial"] == {"lambda": value, "policy": answer["dial"]["policy"], "route": None}
    assert "prompt_text" not in answer


def test_a_schedule_reaches_the_engine_as_text_beside_what_else_it_is_told(folder: Path):
    vllm = Vllm()
    schedule = {"kind": "thinking", "think": 0.0, "answer": 1.0}
    extras = {"session": "s"}
    ask(
        before(vllm, folder), prompt="1", path=COMPLETION, vllm_xargs=extras, **{"lambda": schedule}
    )
    [body] = vllm.bodies
    assert json.loads(body["vllm_xargs"].pop("lambda")) == schedule
    assert body == {"prompt": "1", "vllm_xargs": extras}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lambda": 1.5}, "lambda"),
        ({"lambda": "fast"}, "lambda"),
        ({"lamda": 1}, "lamda"),
        ({"lambda": 1, "control": 1}, "control"),
        ({"extra_body": {"lambda": 1}}, "extra_body"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        (xargs(0.5), "vllm_xargs"),
        ({"lambda": 0.5} | xargs(2), "vllm_xargs"),
        ({"vllm_xargs": {"flexalign_stop": ["a", "b", "c"]}}, "vllm_xargs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"lambda": {"policy": "adaptive", "measure": "agreement"}}, "lambda"),
        ({"lambda": "auto", "n": 2}, "n"),
        ({"lambda": "auto", "tools": [{"type": "function"}]}, "tools"),
        ({"lambda": {"policy": "route", "share": 0.5}, "n": 2}, "n"),
        ({"lambda": {"policy": "exit"}}, "lambda"),
    ],
)
def test_what_would_not_arrive_is_refused(folder: Path, body: Any, param: str):
    vllm = Vllm()
    status, answer = ask(before(vllm, folder), **{"messages": []} | body)
    assert (status, answer["error"]["param"], vllm.bodies) == (400, param, [])


@pytest.mark.parametrize(
    "path",
    ["/v1/embeddings", "/invocations", "/inference/v1/generate", f"{CHAT}/batch"],
)
def test_other_routes_have_no_dial_and_say_so(folder: Path, path: str):
    vllm = Vllm()
    app = before(vllm, folder)
    sampling = {"sampling_params": {"extra_args": {"lambda": 2}}}
    efforts = ({"reasoning": {"effort": "low"}}, {"output_config": {"effort": "low"}})
    for body in ({"lambda": 1}, {"effort": 3}, {"lamda": 1}, xargs(2), sampling, *efforts):
        status, answer = ask(app, path, **body)
        assert (status, vllm.bodies) == (400, [])
        assert CHAT in answer["error"]["message"] or "did you mean" in answer["error"]["message"]
    others = {"input": "a", "reasoning": {"summary": "auto", "effort": None}}
    assert ask(app, path, **others) == (200, {"id": "other"})
    assert vllm.bodies == [others]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "1+2?"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "1+2?"}], "max_tokens": 9}),
    ],
)
def test_other_protocols_reach_the_chat_with_their_dial(
    folder: Path, path: str, body: dict[str, Any]
):
    vllm = Vllm()
    app = before(vllm, folder)
    ask(app, path, **body, **{"lambda": 0.25})
    [sent] = vllm.bodies
    assert sent["messages"] == [{"role": "user", "content": "1+2?"}]
    assert sent["vllm_xargs"]["lambda"] == 0.25
    for wrong in ({"lambda": 7}, {"lamda": 1}, xargs(2)):
        assert ask(app, path, **body, **wrong)[0] == 400
    assert len(vllm.bodies) == 1


def test_a_root_path_is_no_way_round(folder: Path):
    vllm = Vllm()

    async def rooted(scope: Any, receive: Any, send: Any) -> None:
        inner = {**scope, "root_path": "/api", "path": f"/api{scope['path']}"}
        await before(vllm, folder)(inner, receive, send)

    assert ask(rooted, prompt="1", path=COMPLETION, **{"lambda": 7})[0] == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("words", "prompt", "thinking", "content"),
    [
        (TEXT, "3+4?", " 3 + 4", " 7"),
        ([" 7", "<eos>"], "3+4?", None, " 7"),
        (["<th", "ink>a</thi", "nk> 7", "<eos>"], "3+4?", "a", " 7"),
        (["3 +", " 4</think>", " 7", "<eos>"], "3+4?<think>", "3 + 4", " 7"),
        (["3 +", " 4", "<eos>"], "3+4?<think>", "3 + 4", ""),
    ],
)
def test_thinking_is_told_apart(
    folder: Path, words: list[str], prompt: str, thinking: str | None, content: str, stream: bool
):
    vllm = Vllm(words)
    vllm.prompt = prompt
    status, answer = ask(before(vllm, folder), messages=[], stream=stream)
    assert status == 200
    if stream:
        deltas = [part["delta"] for chunk in answer for part in chunk["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all(deltas[1:-1])
        told = {
            key: "".join(delta.get(key) or "" for delta in deltas) or None
            for key in ("reasoning", "reasoning_content", "content")
        }
        assert [answer[0]["dial"], answer[-1]["dial"]] == [answer[0]["dial"]] * 2
        assert not any("prompt_text" in chunk for chunk in answer)
    else:
        told = answer["choices"][0]["message"]
    assert told["reasoning"] == told["reasoning_content"] == thinking
    assert (told["content"] or "") == content


def test_what_a_parser_of_vllms_found_is_kept(folder: Path):
    class Parsed(Vllm):
        def _answer(self, body: Any, is_chat: bool) -> Any:
            answer = super()._answer(body, is_chat)
            answer["choices"][0]["message"] |= {"reasoning": "r", "content": "<think>"}
            answer["usage"]["completion_tokens_details"] = {"reasoning_tokens": 9}
            return answer

    _, answer = ask(before(Parsed(), folder), messages=[])
    message = answer["choices"][0]["message"]
    assert [message[key] for key in ("reasoning", "reasoning_content")] == ["r", "r"]
    assert message["content"] == "<think>"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 9


@pytest.mark.parametrize(
    ("finish", "stop_reason", "written"),
    [("stop", None, 4), ("stop", 2, 4), ("stop", "7", 5), ("length", None, 5)],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_usage_counts_as_the_library_does(
    folder: Path, path: str, stream: bool, finish: str, stop_reason: Any, written: int
):
    vllm = Vllm()
    vllm.finish, vllm.stop_reason = finish, stop_reason
    more = {"stream_options": {"include_usage": True}} if stream else {}
    _, answer = ask(before(vllm, folder), path, messages=[], prompt="1", stream=stream, **more)
    usage = answer[-1]["usage"] if stream else answer["usage"]
    assert usage["completion_tokens"] == written
    assert usage["total_tokens"] == 5 + written
    assert usage["completion_tokens_details"] == {
        "reasoning_tokens": 3,
        "rejected_prediction_tokens": 0,
    }


def adaptive(threshold: float, measure: str = "answer_probability") -> dict[str, Any]:
    policy = {"policy": "adaptive", "threshold": threshold, "measure": measure}
    return {"lambda": policy | {"fast_lambda": 0.75, "slow_lambda": 0.25}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("measure", ["answer_probability", "min_token_probability"])
def test_a_sure_fast_answer_is_the_answer(folder: Path, path: str, stream: bool, measure: str):
    log_probs = [-0.1, -0.2, -0.3, -0.1, -0.05]
    vllm, plain = Vllm(log_probs=log_probs), Vllm()
    given: dict[str, Any] = {"messages": [], "prompt": "1", "stream": stream}
    if stream:
        given["stream_options"] = {"include_usage": True}
    status, answer = ask(
        before(vllm, folder), path, seed=5, temperature=0.9, **given, **adaptive(0.3, measure)
    )
    expected = math.exp(-0.75 if measure == "answer_probability" else -0.3)
    [body] = vllm.bodies
    assert body["vllm_xargs"] == {"lambda": 0.75}
    assert (body["temperature"], "seed" in body, body["stream"]) == (0, False, True)
    _, alone = ask(before(plain, folder), path, **given)
    dials = [part.pop("dial", None) for part in (answer if stream else [answer])]
    for part in alone if stream else [alone]:
        part.pop("dial", None)
    assert dials[0] == dials[-1]
    assert dials[0].pop("confidence") == pytest.approx(expected)
    taken = {"policy": "adaptive", "route": "fast", "lambda": 0.75, "rejected_tokens": 0}
    assert dials[0] == taken
    assert status == 200
    if not stream:
        for value in (answer, alone):
            message = value["choices"][0].get("message", {})
            for key in ("tool_calls", "refusal"):
                message.pop(key, None)
    assert answer == alone


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_an_unsure_fast_answer_is_let_go_of_and_nobody_sees_it(
    folder: Path, path: str, stream: bool
):
    vllm = Vllm([f"w{i}" for i in range(50)] + ["<eos>"], [-0.1, -0.1, -2.0, *[-0.1] * 48])
    given: dict[str, Any] = {"messages": [], "prompt": "1", "stream": stream, "seed": 5}
    if stream:
        given["stream_options"] = {"include_usage": True}
    _, answer = ask(before(vllm, folder), path, **given, **adaptive(0.5))
    fast, slow = vllm.bodies
    assert (fast["vllm_xargs"], slow["vllm_xargs"]) == ({"lambda": 0.75}, {"lambda": 0.25})
    own = {"return_prompt_text"} if path == CHAT else set()
    assert {key: value for key, value in slow.items() if key not in own | {"vllm_xargs"}} == given
    assert vllm.written[0] < 10
    last = answer[-1] if stream else answer
    dial = last["dial"]
    assert dial.pop("confidence") == pytest.approx(math.exp(-2.2))
    taken = {"policy": "adaptive", "route": "slow", "lambda": 0.25, "rejected_tokens": 3}
    assert dial == taken
    assert last["usage"]["completion_tokens"] == 50 + 3
    assert last["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 3
    if stream:
        ended = [part for chunk in answer for part in chunk["choices"] if part["finish_reason"]]
        assert len(ended) == 1


def test_a_fast_answer_that_is_cut_off_is_never_accepted(folder: Path):
    vllm = Vllm()
    vllm.finish = "length"
    _, answer = ask(before(vllm, folder), messages=[], **adaptive(0))
    assert answer["dial"]["route"] == "slow"
    assert answer["dial"]["rejected_tokens"] == 5


def test_log_probabilities_are_told_to_those_who_asked(folder: Path):
    for asked in (True, False):
        vllm = Vllm()
        _, answer = ask(before(vllm, folder), messages=[], logprobs=asked, **adaptive(0.1))
        told = answer["choices"][0]["logprobs"]
        assert [one["logprob"] for one in told["content"]] == [-0.1] * 5 if asked else told is None


@pytest.mark.parametrize(("threshold", "route"), [(0.5, "fast"), (0.7, "slow")])
def test_a_calibration_is_gone_by(folder: Path, tmp_path: Path, threshold: float, route: str):
    points = {"thresholds": [[0, 0.0], [100, 1.0]], "lambdas": [[0, 1.0], [100, 0.0]]}
    calibration = {"version": 1, "effort": points, "holes": [], "threshold": threshold}
    calibration["measure"] = "answer_probability"
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy, symlinks=True)
    settings = replace(InRaConfig.load(folder), calibration=calibration)
    (copy / "inra_config.json").write_text(settings.to_text())
    app = before(Vllm(), copy)
    _, answer = ask(app, messages=[], **{"lambda": {"policy": "adaptive"}})
    assert answer["dial"]["route"] == route
    _, answer = ask(app, messages=[], effort=threshold * 100)
    assert (answer["dial"]["route"], answer["dial"]["effort"]) == (route, threshold * 100)


def test_an_error_of_the_fast_call_is_the_answer(folder: Path):
    vllm = Vllm()
    vllm.failure = {"error": {"message": "too long", "code": 400}}
    status, answer = ask(before(vllm, folder), messages=[], **adaptive(0.5))
    assert (status, answer["error"]["message"]) == (400, "too long")

    class Dying(Vllm):
        async def _event(self, send: Any, choices: Any, is_chat: bool, **more: Any) -> None:
            error = b'data: {"error": {"message": "the engine is dead", "code": 500}}\n\n'
            await send({"type": "http.response.body", "body": error, "more_body": True})

    for stream in (False, True):
        status, answer = ask(before(Dying(), folder), messages=[], stream=stream, **adaptive(0.5))
        assert (status, answer["error"]["type"]) == (500, "server_error")


def test_a_client_that_leaves_stops_the_fast_answer(folder: Path):
    vllm = Vllm([f"w{i}" for i in range(1000)] + ["<eos>"], [-1e-9] * 1001)
    sent = request(before(vllm, folder), CHAT, {"messages": []} | adaptive(0.5), leaves_after=0)
    assert sent == []
    assert len(vllm.bodies) == 1
    assert vllm.written[0] < 10


def test_a_route_is_drawn_by_the_seed(folder: Path):
    dial = {"lambda": {"policy": "route", "share": 0.5, "fast_lambda": 0.9}}
    ways = []
    for seed in range(8):
        vllm = Vllm()
        _, answer = ask(before(vllm, folder), messages=[], seed=seed, **dial)
        way = Route(0.5, 0.9).draw(torch.Generator().manual_seed(seed))
        lam = 0.9 if way == "fast" else 0.0
        taken = {"policy": "route", "route": way, "lambda": lam, "rejected_tokens": 0}
        assert answer["dial"] == taken
        assert vllm.bodies[0]["vllm_xargs"] == {"lambda": lam}
        ways.append(way)
    assert set(ways) == {"fast", "slow"}


def test_models_tell_their_dial(folder: Path):
    _, answer = ask(before(Vllm(), folder, lambda_range=(-1.0, 2.0)), "/v1/models", "GET")
    fixed = {"policy": "fixed", "lambda": 0.0}
    expected = {"default": fixed, "lambda_range": [-1.0, 2.0], "effort": False}
    expected["meaning"] = LAMBDA_LEGEND
    assert answer == {"data": [{"id": "m", "dial": expected}]}


def test_a_key_guards_all_that_answers(folder: Path):
    app = before(Vllm(), folder, key="sesame")
    for path in (CHAT, "/invocations", "/v1/embeddings"):
        assert ask(app, path, messages=[])[0] == 401
        assert ask(app, path, messages=[], key="sesame")[0] == 200


def start(vllm: Vllm, folder: Path) -> Any:
    """Start the server's life as uvicorn does, through the middleware; return what it is told."""
    vllm.state.args.model = str(folder)
    told: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        told.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    front = Front(app)
    asyncio.run(front({"type": "lifespan", "app": vllm}, receive, send))
    return told[0]


def test_the_middleware_reads_its_rules_at_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert start(Vllm(), folder) == {"type": "lifespan.startup.complete"}
    failed = start(Vllm(), tmp_path)
    assert failed["type"] == "lifespan.startup.failed"
    assert "holds no InRa adapter" in failed["message"]
    monkeypatch.setenv(VARIABLE, FrontOptions((0.5, 1.0)).to_text())
    assert "--lambda-range" in start(Vllm(), folder)["message"]


def test_without_a_key_this_machine_alone_is_served(folder: Path):
    local = before(Vllm(), folder, is_local=True)
    assert ask(local, "/v1/models", "GET", host="rebound.example")[0] == 403
    assert ask(local, "/v1/models", "GET", host="localhost:8000")[0] == 200
    keyed = before(Vllm(), folder, key="secret", is_local=True)
    assert ask(keyed, "/v1/models", "GET", key="secret", host="gpu.example")[0] == 200
    assert ask(before(Vllm(), folder), "/v1/models", "GET", host="gpu.example")[0] == 200


def test_options_go_through_the_environment():
    options = FrontOptions((-1.0, 2.0), 1000, True, True)
    assert FrontOptions.read(options.to_text()) == options
    assert FrontOptions.read(None) == FrontOptions()
    for text in ("[", "[1]", '{"range": 1}', '{"lambda_range": [1]}', '{"body_limit": "x"}'):
        with pytest.raises(ConfigError, match=VARIABLE):
            FrontOptions.read(text)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no InRa adapter"):
        before(Vllm(), tmp_path)


def test_extras_that_are_none_are_left_to_vllm_to_refuse(folder: Path):
    vllm = Vllm()
    ask(before(vllm, folder), messages=[], vllm_xargs=[1], **{"lambda": 0.5})
    assert vllm.bodies[0]["vllm_xargs"] == [1]


def test_a_prompt_of_tokens_may_leave_the_thinking_open(folder: Path):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("3+4?<think>", add_special_tokens=False)["input_ids"]
    words = ["3 +", " 4", "<eos>"]
    counted = []
    for prompt in (ids, "3+4?<think>", "3+4?"):
        _, answer = ask(before(Vllm(words), folder), COMPLETION, prompt=prompt)
        counted.append(answer["usage"]["completion_tokens_details"]["reasoning_tokens"])
    assert counted[0] == counted[1] > 0
    assert counted[2] == 0


@pytest.mark.parametrize("content", [b"--part\r\n", b"", b"[1]"])
def test_a_body_that_is_no_object_passes_on_other_routes(folder: Path, content: bytes):
    heard: list[bytes] = []

    async def transcribe(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["body"])

    front = build_front(transcribe, folder, FrontOptions(), None)
    request(front, "/v1/audio/transcriptions", content)
    assert heard == [content]


def test_a_client_that_leaves_before_its_body_is_whole_gets_nothing(folder: Path):
    vllm = Vllm()
    request(before(vllm, folder), "/v1/embeddings", (), leaves_after=0)
    assert vllm.paths == []


def test_what_goes_wrong_in_the_fast_call_is_not_swallowed(folder: Path):
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("the engine is gone")

    with pytest.raises(RuntimeError, match="the engine is gone"):
        ask(before(broken, folder), messages=[], **adaptive(0.5))


def test_an_error_in_a_stream_passes_as_it_is(folder: Path):
    error = {"error": {"message": "the engine is dead", "code": 500}}

    class Dying(Vllm):
        async def _event(self, send: Any, choices: Any, is_chat: bool, **more: Any) -> None:
            content = f"data: {json.dumps(error)}\n\n".encode()
            await send({"type": "http.response.body", "body": content, "more_body": True})

    _, chunks = ask(before(Dying(["a"]), folder), messages=[], stream=True)
    assert chunks[0] == error


def test_what_a_parser_found_in_a_stream_is_kept(folder: Path):
    class Parsed(Vllm):
        async def _event(self, send: Any, choices: Any, is_chat: bool, **more: Any) -> None:
            for choice in choices:
                content = choice["delta"].pop("content", None)
                choice["delta"] |= {"reasoning": content} if content else {}
            await super()._event(send, choices, is_chat, **more)

    _, chunks = ask(before(Parsed([" 3", "<eos>"]), folder), messages=[], stream=True)
    deltas = [part["delta"] for chunk in chunks for part in chunk["choices"]]
    assert [(d["reasoning"], d["reasoning_content"]) for d in deltas if d.get("reasoning")] == [
        (" 3", " 3")
    ]


def test_tags_that_are_special_tokens_are_asked_for(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<think>", "</think>"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    for served, expected in ((folder, None), (copy, False)):
        vllm = Vllm()
        ask(before(vllm, served), messages=[])
        assert vllm.bodies[0].get("skip_special_tokens") is expected
    vllm = Vllm()
    ask(before(vllm, copy), messages=[], skip_special_tokens=True)
    assert vllm.bodies[0]["skip_special_tokens"] is True


def test_without_a_start_of_the_server_a_bad_folder_is_an_error_of_the_request(tmp_path: Path):
    vllm = Vllm()
    vllm.state.args.model = str(tmp_path)
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": [], "app": vllm}
    with pytest.raises(CheckpointError, match="no InRa adapter"):
        asyncio.run(Front(vllm)(scope, None, None))


def test_metrics_tell_the_dials_beside_what_vllm_tells(folder: Path):
    front = before(Vllm(), folder)
    own = prometheus_client.Gauge("vllm:a", "As vLLM registers its own.")
    own.set(1)

    def told(accept: bytes) -> dict[str, float]:
        headers = [(b"accept", accept), (b"accept-encoding", b"gzip")]
        [start, body] = request(front, "/metrics", method="GET", headers=headers)
        assert start["status"] == 200
        text = gzip.decompress(body["body"]).decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}

    names = (
        "flexalign_lambda_count",
        'flexalign_lambda_bucket{le="0.25"}',
        'flexalign_routes_total{policy="route",route="slow"}',
    )
    try:
        for accept, name in ((b"*/*", "vllm:a"), (b"application/openmetrics-text", "vllm_a")):
            then = told(accept)
            for lam in (0.5, 0.25, {"policy": "route", "share": 1}):
                ask(front, messages=[], **{"lambda": lam})
            ask(front, messages=[], **{"lambda": 9})
            now = told(accept)
            assert now[name] == 1.0
            assert [now[ours] - then.get(ours, 0) for ours in names] == [2, 1, 1]
    finally:
        prometheus_client.REGISTRY.unregister(own)


def test_metrics_of_several_processes_are_added_up(tmp_path: Path):
    script = """
import os
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from flexalign.lambdas import Fixed
from flexalign.serving.vllm.middleware import dial_metrics
for lam in (0.25, 0.5):
    if os.fork() == 0:
        dial_metrics().began(Fixed(lam))
        os._exit(0)
    os.wait()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "flexalign_lambda_count 2.0" in done.stdout.splitlines()
    assert 'flexalign_lambda_bucket{le="0.25"} 1.0' in done.stdout.splitlines()


BUSY = "The engine is currently busy and cannot accept new requests. Please try again later"


@pytest.mark.parametrize(
    ("status", "told", "expected"),
    [
        (404, {"detail": "Not Found"}, (404, "not_found_error", None, None)),
        (405, {"detail": "No"}, (405, "invalid_request_error", None, None)),
        (400, {"error": {"message": "m", "type": "BadRequestError", "param": "stop", "code": 400}},
         (400, "invalid_request_error", "stop", None)),
        (500, {"error": {"message": "m", "type": "Internal", "code": 500}},
         (500, "server_error", None, None)),
        (503, {"error": {"message": BUSY, "code": 503}}, (429, "rate_limit_error", None, "queue_full")),
        (503, {"error": {"message": "dead", "code": 503}}, (503, "server_error", None, None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dial", [0.5, {"policy": "adaptive", "threshold": 0.5}])
def test_what_vllm_refuses_has_openais_form(
    folder: Path, status: int, told: dict[str, Any], expected: Any, dial: Any
):
    vllm = Vllm()
    vllm.failure, vllm.status = told, status
    sent = request(before(vllm, folder), CHAT, {"messages": [], "lambda": dial})
    error = json.loads(sent[1]["body"])["error"]
    found = (sent[0]["status"], error["type"], error["param"], error["code"])
    assert found == expected
    assert error["message"] == told.get("detail", told.get("error", {}).get("message"))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-length"] == str(len(sent[1]["body"])).encode()
    assert headers.get(b"retry-after") == (b"1" if expected[0] == 429 else None)


def test_an_error_that_is_no_json_is_left_alone(folder: Path):
    vllm = Vllm()
    vllm.failure, vllm.status = {"message": "a form of its own"}, 400
    sent = request(before(vllm, folder), CHAT, {"messages": []})
    assert (sent[0]["status"], json.loads(sent[1]["body"])) == (400, vllm.failure)


def test_arguments_that_the_chat_template_does_not_read_are_refused(folder: Path, tmp_path: Path):
    vllm = Vllm()
    status, answer = ask(before(vllm, folder), messages=[], chat_template_kwargs={"thinking": 1})
    assert status == 400
    assert answer["error"]["param"] == "chat_template_kwargs"
    assert "sets 'thinking', which the chat template does not read" in answer["error"]["message"]
    assert vllm.bodies == []

    reading = shutil.copytree(folder, tmp_path / "reading")
    tokenizer = load_tokenizer(reading)
    tokenizer.chat_template += "{{ thinking }}"
    tokenizer.save_pretrained(reading)
    status, _ = ask(before(vllm, reading), messages=[], chat_template_kwargs={"thinking": 1})
    assert status == 200
    assert vllm.bodies[-1]["chat_template_kwargs"] == {"thinking": 1}
