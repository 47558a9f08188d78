"""The application in this process: its routes, and what it says of requests that it cannot serve."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from asgi import request
from counting import count_lambda
from flexalign.errors import ConfigError
from flexalign.inra.configuration import InRaConfig
from flexalign.lambdas import Dial
from flexalign.models.sources import resolve_adapter
from flexalign.serving.app import create_app
from flexalign.serving.engine import EngineLimits
from flexalign.serving.engine.sequence import AnswerSequence
from flexalign.serving.server import ServeOptions, load_service
from flexalign.serving.service import Service

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "3+14+15?"}]


class Served(NamedTuple):
    """The miniature's dial behind the application."""

    service: Service
    app: Any

    def ask(self, path: str, method: str = "POST", **body: Any) -> tuple[int, Any]:
        """Return the status, and the object, the text, or the events of a stream."""
        sent: list[Any] = []
        with contextlib.suppress(RuntimeError):  # what a server logs after its answer
            request(self.app, path, body, method=method, sent=sent)
        content = b"".join(message.get("body", b"") for message in sent[1:]).decode()
        if content.startswith("data: "):
            events = content.removesuffix("\n\n").split("\n\n")
            return sent[0]["status"], [event.removeprefix("data: ") for event in events]
        kind = dict(sent[0]["headers"])[b"content-type"]
        return sent[0]["status"], json.loads(content) if b"json" in kind else content

    def refused(self, status: int, path: str, says: str, method: str = "POST", **body: Any) -> Any:
        """Check that a request is refused in OpenAI's form; return the error."""
        found, answer = self.ask(path, method, **body)
        assert found == status, answer
        assert says in answer["error"]["message"]
        return answer["error"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    options = ServeOptions("miniature", "miniature:fast", limits=EngineLimits(queue=4))
    service, rules = load_service(options)
    yield Served(service, create_app(service, rules))
    service.engine.stop()


def test_a_path_that_is_none_is_refused_in_openais_form(served: Served):
    error = served.refused(404, "/v1/engines", "GET /v1/engines: not found.", "GET")
    assert error["type"] == "not_found_error"
    served.refused(405, CHAT, f"GET {CHAT}: method not allowed.", "GET")


def test_models_are_told_one_by_one(served: Served):
    _, whole = served.ask("/v1/models", "GET")
    assert served.ask("/v1/models/miniature", "GET") == (200, whole["data"][0])
    error = served.refused(404, "/v1/models/other", "there is no model 'other' here.", "GET")
    assert error["code"] == "model_not_found"


def test_a_request_for_another_model_names_the_one_that_is_here(served: Served):
    error = served.refused(404, CHAT, "this server has 'miniature'", messages=MESSAGES, model="gpt")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_dial_that_the_engine_does_not_serve_is_a_bad_dial(served: Served):
    asked = {"messages": MESSAGES, "lambda": {"policy": "adaptive", "measure": "agreement"}}
    error = served.refused(400, CHAT, 'the measure "agreement" samples several answers', **asked)
    assert (error["param"], error["code"]) == ("lambda", "invalid_dial")


def test_a_bodys_lambda_is_not_looked_at_again_behind_the_door(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    counts = count_lambda(monkeypatch, 0.375)
    status, answer = served.ask(COMPLETION, prompt="1+2?", max_tokens=3, **{"lambda": 0.375})
    assert (status, answer["dial"]["lambda"]) == (200, 0.375)
    assert (counts["parses"], counts["ranges"]) == (0, 1)


def test_metrics_count_what_was_written(served: Served):
    def count() -> float:
        _, text = served.ask("/metrics", "GET")
        [line] = [
            one for one in text.splitlines() if one.startswith("flexalign_generated_tokens_total ")
        ]
        return float(line.split()[-1])

    before = count()
    assert served.ask(COMPLETION, prompt="1+2?", max_tokens=3, stop=["never"])[0] == 200
    assert count() - before == 3


def test_prompts_that_cannot_be_encoded_are_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    vocabulary = served.service.model.vocabulary
    says = f"prompt has the token id {vocabulary}; this model's are 0 to {vocabulary - 1}."
    assert served.refused(400, COMPLETION, says, prompt=[3, vocabulary])["param"] == "prompt"
    says = f"may get {10**6} more; this server's context is {served.service.model.context}"
    error = served.refused(400, CHAT, says, messages=MESSAGES, max_tokens=10**6)
    assert error["code"] == "context_length_exceeded"
    tokenizer = served.service.model.tokenizer
    for template, says in (
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ 1 / 0 }}", "messages: the chat template fails on them (ZeroDivisionError"),
        (None, "messages: this model has no chat template; send a prompt to /v1/completions."),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        assert served.refused(400, CHAT, says, messages=MESSAGES)["param"] == "messages"


def test_a_dial_that_the_engine_cannot_follow_is_refused_by_its_key(
    served: Served, monkeypatch: pytest.MonkeyPatch
):
    def check(dial: Dial | None) -> None:
        raise ConfigError("the tag <think> is not one token.")

    monkeypatch.setattr(served.service.engine, "check", check)
    error = served.refused(400, CHAT, "lambda: the tag <think> is", messages=MESSAGES)
    assert (error["param"], error["code"]) == ("lambda", "invalid_dial")


def test_more_answers_than_may_ever_wait_are_refused_for_good(served: Served):
    says = "n: the request asks for 5 answers, n to each prompt, and this server takes 4 at most"
    assert served.refused(400, CHAT, says, messages=MESSAGES, n=5)["param"] == "n"


def test_a_stream_counts_at_its_end_if_it_is_asked_to(served: Served):
    asked: dict[str, Any] = {"prompt": "1+2?", "max_tokens": 3, "stop": ["never"], "stream": True}
    asked |= {"seed": 5}
    asked |= {"logprobs": 2, "stream_options": {"include_usage": True}}
    status, events = served.ask(COMPLETION, **asked)
    assert (status, events[-1]) == (200, "[DONE]")
    *chunks, last = map(json.loads, events[:-1])
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert all(chunk["usage"] is None for chunk in chunks)
    parts = [chunk["choices"][0] for chunk in chunks]
    text = ""
    for part in parts:
        assert part["logprobs"]["text_offset"][:1] in ([], [len(text)])
        assert all(len(top) == 2 for top in part["logprobs"]["top_logprobs"])
        text += part["text"]
    assert sum(len(part["logprobs"]["tokens"]) for part in parts) == 3
    assert (
        text
        == served.ask(COMPLETION, **asked | {"stream": False, "stream_options": None})[1][
            "choices"
        ][0]["text"]
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_that_breaks_is_told_and_the_next_is_served(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
    n: int,
):
    accept = AnswerSequence.accept

    def break_once(self: AnswerSequence, *given: Any) -> bool:
        monkeypatch.setattr(AnswerSequence, "accept", accept)
        raise RuntimeError("out of luck")

    asked: dict[str, Any] = {"prompt": "1+2?", "max_tokens": 3, "stop": ["never"], "n": n}
    monkeypatch.setattr(AnswerSequence, "accept", break_once)
    says = "the server failed on this request; its log says why."
    if stream:
        status, events = served.ask(COMPLETION, stream=True, **asked)
        assert status == 200
        assert json.loads(events[-1])["error"]["message"] == says
    else:
        assert served.refused(500, COMPLETION, says, **asked)["type"] == "server_error"
    assert "out of luck" in caplog.text
    status, answer = served.ask(COMPLETION, **asked)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3 * n)
    assert served.service.engine.running == 0


def test_effort_turns_the_dial_of_a_calibrated_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    points = {"thresholds": [], "lambdas": [[0, 1.0], [50, 0.6], [100, 0.0]]}
    calibration = {"version": 1, "effort": points, "holes": [[0.1, 0.5]], "threshold": 0.5}
    calibration |= {"measure": "answer_probability", "sampling": {"temperature": 0.7}}
    fast = shutil.copytree(resolve_adapter("miniature:fast"), tmp_path / "fast")
    settings = replace(InRaConfig.load(fast), calibration=calibration)
    (fast / "inra_config.json").write_text(settings.to_text())
    service, rules = load_service(ServeOptions("miniature", str(fast)))
    served = Served(service, create_app(service, rules))

    def written(**dial: Any) -> tuple[Any, str]:
        asked = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0, **dial}
        _, answer = served.ask(CHAT, **asked)
        [choice] = answer["choices"]
        return answer["dial"], choice["message"]["content"]

    try:
        (dial, answer), (same, expected) = written(reasoning_effort="none"), written(effort=0)
        assert dial == {"lambda": 1.0, "policy": "fixed", "route": None}
        assert (answer, same) == (expected, dial | {"effort": 0})
        assert "" == written(reasoning_effort="xhigh")[1] != answer  # it is thinking still
        assert written(reasoning_effort="medium")[0]["lambda"] == 0.6
        assert written(effort=70)[0]["lambda"] == 0.5  # 0.36 lies in the hole
        assert "worse than both ends" in written(**{"lambda": 0.3})[0]["note"]
        served.refused(400, CHAT, "0 (fastest) to 100", messages=MESSAGES, effort=101)
    finally:
        service.engine.stop()
    assert caplog.text.count("effort was calibrated at temperature 0.7") == 1


def test_a_request_below_a_root_path_is_counted_by_its_path(served: Served):
    def counted() -> int:
        told = served.service.metrics.text().decode().splitlines()
        [line] = [one for one in told if one.startswith('flexalign_requests_total{path="/health"')]
        return int(float(line.split()[-1]))

    request(served.app, "/health", method="GET")
    before = counted()
    request(served.app, "/behind/health", method="GET", root_path="/behind")
    assert counted() == before + 1
