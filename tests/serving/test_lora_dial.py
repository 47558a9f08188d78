"""A LoRA dial on the local server: every request its own λ, in one batch, as the library writes it."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asgi import request
from flexalign.errors import ConfigError
from flexalign.generation.responses import generate_responses
from flexalign.lora_dial import LoRADial
from flexalign.serving.app import create_app
from flexalign.serving.engine import EngineLimits
from flexalign.serving.server import ServeOptions, load_service
from lora_folders import BASE, write_dial

CHAT = "/v1/chat/completions"
QUESTIONS = ["3+14+15?", "7+7+7?", "12+5+7+1?"]
TOKENS = 30


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dial(tmp_path_factory.mktemp("lora") / "dial")


@pytest.fixture(scope="module")
def app(dial: Path) -> Iterator[Any]:
    service, rules = load_service(ServeOptions(BASE, str(dial), limits=EngineLimits()))
    yield create_app(service, rules)
    service.engine.stop()


def ask(app: Any, question: str, **body: Any) -> tuple[int, Any]:
    sent: list[Any] = []
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS} | body
    request(app, CHAT, {"temperature": 0, **body}, method="POST", sent=sent)
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


def text_of(answer: Any) -> str:
    message = answer["choices"][0]["message"]
    return f"{message.get('reasoning') or ''}|{message['content']}"


@pytest.fixture(scope="module")
def alone(dial: Path) -> Any:
    model = LoRADial.from_pretrained(BASE, dial)

    def write(question: str, lam: Any) -> int:
        [found] = generate_responses(
            model,
            model.tokenizer,
            [[{"role": "user", "content": question}]],
            max_new_tokens=TOKENS,
            temperature=0,
            lam=[lam],
        )
        return found

    return write


def test_requests_of_one_batch_keep_their_own_lambda(app: Any, alone: Any) -> None:
    lams = [0.0, 0.5, 1.0, 4.0, {"kind": "thinking", "think": 0.5, "answer": 4.0}]
    pairs = [(question, lam) for question in QUESTIONS for lam in lams]
    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = list(pool.map(lambda pair: ask(app, pair[0], **{"lambda": pair[1]}), pairs))
    for (question, lam), (status, answer) in zip(pairs, answers, strict=True):
        assert status == 200, answer
        expected = alone(question, lam)
        assert answer["usage"]["completion_tokens"] == expected.tokens
        said = text_of(answer).replace("|", "")
        assert said.split() == [
            w for w in expected.text.split() if w not in ("<think>", "</think>")
        ]
        if isinstance(lam, float):
            assert answer["dial"]["lambda"] == lam


def test_a_rejected_fast_answer_begins_again_at_its_own_lambda(app: Any, alone: Any) -> None:
    policy = {"policy": "adaptive", "threshold": 1, "fast_lambda": 4, "slow_lambda": 0.5}
    status, answer = ask(app, QUESTIONS[0], **{"lambda": policy})
    assert (status, answer["dial"]["route"]) == (200, "slow")
    slow = ask(app, QUESTIONS[0], **{"lambda": 0.5})[1]
    assert text_of(answer) == text_of(slow)


def test_the_range_is_the_dials(app: Any) -> None:
    sent: list[Any] = []
    request(app, "/v1/models", {}, method="GET", sent=sent)
    assert b'"lambda_range":[0.0,5.0]' in sent[1]["body"].replace(b" ", b"")
    status, answer = ask(app, QUESTIONS[0], **{"lambda": 6})
    assert (status, "outside the range [0, 5]" in answer["error"]["message"]) == (400, True)
    assert ask(app, QUESTIONS[0])[1]["dial"]["lambda"] == 1.0


def test_a_gate_that_no_request_can_reach_is_said() -> None:
    options = ServeOptions("miniature", "miniature:fast", gate=0.01)
    with pytest.warns(UserWarning, match=r"^--gate has no effect: .* --lambda-range permits none"):
        load_service(options)[0].engine.stop()
    load_service(replace(options, lambda_range=(0, 2)))[0].engine.stop()  # warnings are errors


def test_a_gate_is_refused_and_a_plain_lora_has_two_settings(dial: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no gate"):
        load_service(ServeOptions(BASE, str(dial), gate=0.01))
    plain = shutil.copytree(dial, tmp_path / "plain")
    (plain / "lora_dial.json").unlink()
    service, rules = load_service(ServeOptions(BASE, str(plain)))
    try:
        app = create_app(service, rules)
        status, answer = ask(app, QUESTIONS[0], **{"lambda": 0.5})
        assert (status, "plain LoRA" in answer["error"]["message"]) == (400, True)
        assert [ask(app, QUESTIONS[0], **{"lambda": lam})[0] for lam in (0, 1)] == [200, 200]
    finally:
        service.engine.stop()
