"""The keys of a body that limit the thinking, on the local engine, beside what the library writes."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from asgi import request
from flexalign.data.logits import LogitsSettings
from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaModel
from flexalign.serving.app import create_app
from flexalign.serving.server import ServeOptions, load_service

CHAT = "/v1/chat/completions"
TOKENS = 40
LIMITS: list[dict[str, Any]] = [
    {},
    {"thinking_budget": 0},
    {"thinking_budget": 9},
    {"thinking_budget": 9, "end_of_thinking_bias": 14.0},
    {"end_of_thinking_bias": 8.0, "lambda": 0.3},
    {"thinking_budget": 12, "lambda": {"policy": "adaptive", "threshold": 1.0}},
    {"end_of_thinking_bias": -50.0},
]


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    service, rules = load_service(ServeOptions("miniature", "miniature:fast"))
    yield create_app(service, rules)
    service.engine.stop()


def ask(app: Any, **body: Any) -> tuple[int, Any]:
    sent: list[Any] = []
    body = {"messages": [{"role": "user", "content": "3+14+15?"}], "max_tokens": TOKENS} | body
    request(app, CHAT, {"temperature": 0.8, "seed": 3, **body}, method="POST", sent=sent)
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


def test_each_request_of_a_batch_has_its_own_limits(app: Any) -> None:
    model = InRaModel.from_pretrained("miniature", "miniature:fast")
    with ThreadPoolExecutor(len(LIMITS)) as pool:
        answers = list(pool.map(lambda body: ask(app, **body), LIMITS))
    thoughts = []
    for body, (status, answer) in zip(LIMITS, answers, strict=True):
        assert status == 200, answer
        limits = {name: value for name, value in body.items() if name != "lambda"}
        [alone] = generate_responses(
            model,
            model.tokenizer,
            [[{"role": "user", "content": "3+14+15?"}]],
            max_new_tokens=TOKENS,
            temperature=0.8,
            seeds=[3],
            lam=[body.get("lambda", 0.0)],
            logits=LogitsSettings(**limits),
        )
        message = answer["choices"][0]["message"]
        said = f"{message.get('reasoning') or ''} {message['content']}".split()
        assert said == [w for w in alone.text.split() if w not in ("<think>", "</think>")]
        assert answer["usage"]["completion_tokens"] == alone.tokens
        thoughts.append(len((message.get("reasoning") or "").split()))
    unlimited, none, budget, earlier, _, slow, _ = thoughts
    assert (none, budget, slow) == (0, 9, 12)
    assert earlier < 9 < 12 < unlimited


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_budget": 1.5}, "thinking_budget"),
        ({"end_of_thinking_bias": 101}, "end_of_thinking_bias"),
        ({"end_of_thinking_bias": "a"}, "end_of_thinking_bias"),
    ],
)
def test_a_value_that_is_none_is_a_400_that_names_its_key(
    app: Any, body: dict[str, Any], key: str
) -> None:
    status, answer = ask(app, **body)
    assert status == 400
    assert answer["error"]["param"] == key


def test_a_model_without_tags_refuses_them(serve_here: Any, tmp_path: Any, tiny_model: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny_model(vocab_size=8).save_pretrained(tmp_path)
    words = {word: n for n, word in enumerate(["a", "?", "b", "<eos>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="?")),
        unk_token="?",
        eos_token="<eos>",
        chat_template="{{ messages[0].content }}",
    )
    tokenizer.save_pretrained(tmp_path)
    app = serve_here(tmp_path)
    for limit in ({"thinking_budget": 3}, {"end_of_thinking_bias": 1.0}):
        status, answer = ask(app, messages=[{"role": "user", "content": "a"}], **limit)
        assert status == 400
        assert "needs tags" in answer["error"]["message"]
        assert answer["error"]["param"] == next(iter(limit))
