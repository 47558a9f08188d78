"""The policy of early exits over HTTP: served by the local engine as the library writes it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from asgi import request
from flexalign.generation.responses import generate_responses
from flexalign.inra import InRaModel
from flexalign.lambdas import Exit
from flexalign.models.loading import load_model, load_tokenizer

CHAT = "/v1/chat/completions"
QUESTION = "6 + 5 + 7 + 3 ?"
EXIT = {"policy": "exit", "threshold": 0.97, "marker": ";"}
TOKENS = 140


def ask(app: Any, **body: Any) -> tuple[int, Any]:
    sent: list[Any] = []
    asked = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS, "seed": 3}
    request(app, CHAT, asked | body, sent=sent)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], content if body.get("stream") else json.loads(content)


def written(answer: Any) -> str:
    message = answer["choices"][0]["message"]
    return f"<think>{message['reasoning']}</think>{message['content']}".replace(" ", "")


def library(model: Any, **policy: Any) -> Any:
    [response] = generate_responses(
        model,
        load_tokenizer("miniature:reference"),
        [[{"role": "user", "content": QUESTION}]],
        max_new_tokens=TOKENS,
        seeds=[3],
        lam=[Exit(marker=";", **policy)],
    )
    return response


@pytest.fixture
def dialled(serve_here: Any) -> Iterator[Any]:
    return serve_here("miniature:reference", adapter="miniature:fast")


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_an_exit_is_the_librarys_and_is_reported(dialled: Any, threshold: float):
    model = InRaModel.from_pretrained("miniature:reference", "miniature:fast")
    expected = library(model, threshold=threshold)
    status, answer = ask(dialled, **{"lambda": EXIT | {"threshold": threshold}})
    assert status == 200, answer
    assert written(answer) == expected.text.replace(" ", "")
    report = answer["dial"]
    assert report["policy"] == "exit"
    assert report["route"] == expected.route == ("fast" if threshold == 0.5 else "slow")
    assert report["lambda"] == (1.0 if threshold == 0.5 else 0.0)
    assert report["rejected_tokens"] == expected.rejected_tokens
    assert report["confidence"] == pytest.approx(expected.confidence, rel=1e-3)
    assert answer["usage"]["completion_tokens"] == expected.tokens
    details = answer["usage"]["completion_tokens_details"]
    assert details["rejected_prediction_tokens"] == expected.rejected_tokens


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_a_stream_is_the_whole_answer_in_pieces(dialled: Any, threshold: float):
    """Nothing of a rejected trial is in it, and the thinking before an exit is."""
    policy = EXIT | {"threshold": threshold}
    _, whole = ask(dialled, **{"lambda": policy})
    _, content = ask(dialled, stream=True, **{"lambda": policy})
    lines = [line[6:] for line in content.decode().splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for line in lines for choice in json.loads(line).get("choices", [])]
    thinking = "".join(delta.get("reasoning") or "" for delta in deltas)
    answer = "".join(delta.get("content") or "" for delta in deltas)
    message = whole["choices"][0]["message"]
    assert (thinking, answer) == (message["reasoning"], message["content"])
    assert sum(bool(delta.get("reasoning")) for delta in deltas) > 5


def test_a_model_without_a_dial_takes_exits_alone(serve_here: Any):
    app = serve_here("miniature:reference")
    expected = library(load_model("miniature:reference"))
    status, answer = ask(app, **{"lambda": {"policy": "exit", "marker": ";"}})
    assert status == 200, answer
    assert written(answer) == expected.text.replace(" ", "")
    assert answer["dial"]["route"] == expected.route == "fast"
    assert "lambda" not in answer["dial"]
    for refused in (0.5, {"policy": "adaptive"}):
        status, answer = ask(app, **{"lambda": refused})
        assert status == 400
        assert "no dial" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"marker": "/"}, "marker '/' is a piece of the closing tag"),
        ({"marker": ""}, "an exit policy's marker must be a text that is not empty"),
        ({"measure": "agreement"}, "samples several answers for one"),
        ({"treshold": 0.5}, "the policy exit takes no 'treshold'"),
        ({"slow_lambda": {"kind": "thinking", "think": 0, "answer": 1}}, "slow_lambda must be a"),
        ({"fast_lambda": 3}, "outside the range"),
    ],
)
def test_refusals(dialled: Any, policy: dict[str, Any], message: str):
    status, answer = ask(dialled, **{"lambda": {"policy": "exit", **policy}})
    assert status == 400
    assert message in answer["error"]["message"]


def test_a_model_without_tags_is_refused(
    serve_here: Any, tiny_pair: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    folder = tmp_path / "silent"
    shutil.copytree(tiny_pair.reference, folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        text.replace("<think>", "<aside>").replace("</think>", "</aside>"), encoding="utf-8"
    )
    status, answer = ask(serve_here(folder), **{"lambda": {"policy": "exit"}})
    assert status == 400
    assert "shows tags around one; take an adaptive policy" in answer["error"]["message"]
