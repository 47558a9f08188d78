"""Arguments of the chat template: a request's own, the operator's, and those of a reasoning_effort."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from asgi import read, request
from flexalign.data.prompting import PromptSettings
from flexalign.models.prompted import PromptPair

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TURNS = [{"role": "user", "content": "one and two"}]
GREEDY = {"max_tokens": 8, "temperature": 0}
LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ reasoning_effort or 'unsaid' }}{{ words | default([]) | join(' ') }}: {% endif %}"
)


@pytest.fixture
def effort_folder(hybrid_folder: Path) -> Path:
    """A model whose template reads ``reasoning_effort``."""
    tokenizer = AutoTokenizer.from_pretrained(hybrid_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(hybrid_folder)
    return hybrid_folder


def ask(app: Any, path: str = CHAT, **body: Any) -> tuple[int, dict[str, Any], str]:
    """Return the status, the answer and what its header says to have had no effect."""
    sent = request(app, path, body)
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    status, content = read(sent)
    return status, json.loads(content), headers.get("x-flexalign-ignored", "")


def written(answer: dict[str, Any]) -> str:
    message = answer["choices"][0]["message"]
    return (message["reasoning"] or "") + message["content"]


def completed(app: Any, folder: Path, **arguments: Any) -> tuple[str, int]:
    """Complete the text that transformers renders; the text without tags, and the prompt's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True, **arguments
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    _, answer, _ = ask(app, COMPLETION, prompt=ids, **GREEDY)
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_a_requests_arguments_reach_the_template(
    serve_here: Callable[..., Any], hybrid_folder: Path, arguments: dict[str, Any]
) -> None:
    app = serve_here(hybrid_folder)
    asked = {"chat_template_kwargs": arguments} if arguments else {}
    status, answer, ignored = ask(app, messages=TURNS, **GREEDY, **asked)
    text, tokens = completed(app, hybrid_folder, **arguments)
    assert (status, ignored) == (200, "")
    assert answer["usage"]["prompt_tokens"] == tokens
    assert written(answer) == text.replace("</think>", "")
    assert "dial" not in answer


def test_a_request_overrides_the_operators_default(
    serve_here: Callable[..., Any], hybrid_folder: Path
) -> None:
    app = serve_here(hybrid_folder, template={"enable_thinking": False})
    plain = completed(app, hybrid_folder, enable_thinking=False)[1]
    thinking = completed(app, hybrid_folder, enable_thinking=True)[1]
    assert plain != thinking
    for given, expected in (({}, plain), ({"enable_thinking": True}, thinking)):
        _, answer, _ = ask(app, messages=TURNS, chat_template_kwargs=given, **GREEDY)
        assert answer["usage"]["prompt_tokens"] == expected


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_an_argument_that_the_template_does_not_read_is_named(
    serve_here: Callable[..., Any], hybrid_folder: Path, path: str
) -> None:
    app = serve_here(hybrid_folder)
    body: dict[str, Any] = {"input": "1"} if path == RESPONSES else {"messages": TURNS}
    body |= {"max_tokens": 2} if path == MESSAGES else {}
    for name, hint in (
        ("enable_thinkin", "did you mean 'enable_thinking'?"),
        ("messages", "known are drop_system, enable_thinking."),
        ("add_generation_prompt", "known are"),
        ("bos_token", "known are"),
    ):
        status, answer, _ = ask(app, path, chat_template_kwargs={name: False}, **body)
        assert status == 400
        told = answer["error"]["message"]
        assert told.startswith(f"chat_template_kwargs sets {name!r}, which the chat template does")
        assert hint in told
    status, answer, _ = ask(app, path, chat_template_kwargs=[1], **body)
    assert (status, answer["error"]["message"]) == (
        400,
        'chat_template_kwargs must be an object, such as {"enable_thinking": false}, got [1].',
    )


def test_arguments_that_a_template_cannot_use_are_the_clients_fault(
    serve_here: Callable[..., Any], effort_folder: Path
) -> None:
    app = serve_here(effort_folder)
    status, answer, _ = ask(app, messages=TURNS, chat_template_kwargs={"words": 3})
    assert status == 400
    assert "chat_template_kwargs" in answer["error"]["message"]
    status, _, _ = ask(app, messages=TURNS, chat_template_kwargs={"words": ["a", "b"]}, **GREEDY)
    assert status == 200


def test_many_different_arguments_do_not_fill_the_memory(
    serve_here: Callable[..., Any], effort_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexalign.data import template

    monkeypatch.setattr(template, "_MOST_SHAPES", 4)
    app = serve_here(effort_folder)
    for number in range(12):
        ask(app, messages=TURNS, max_tokens=1, chat_template_kwargs={"words": [str(number)]})
    assert all(len(known) <= 4 for known in template._shapes.values() if known)


@pytest.mark.parametrize("level", LEVELS)
def test_reasoning_effort_switches_the_thinking_of_a_model_without_a_dial(
    serve_here: Callable[..., Any], hybrid_folder: Path, level: str
) -> None:
    app = serve_here(hybrid_folder)
    _, answer, ignored = ask(app, messages=TURNS, reasoning_effort=level, **GREEDY)
    arguments = {"enable_thinking": level != "none"}
    assert answer["usage"]["prompt_tokens"] == completed(app, hybrid_folder, **arguments)[1]
    assert answer["dial"] == {"reasoning_effort": level, "template": arguments}
    assert ignored == ""


def test_reasoning_effort_is_the_templates_own(
    serve_here: Callable[..., Any], effort_folder: Path
) -> None:
    app = serve_here(effort_folder)
    text, tokens = completed(app, effort_folder, reasoning_effort="medium")
    _, answer, _ = ask(app, messages=TURNS, reasoning_effort="medium", **GREEDY)
    assert (written(answer), answer["usage"]["prompt_tokens"]) == (text, tokens)
    assert answer["dial"]["template"] == {"reasoning_effort": "medium"}

    _, answer, _ = ask(app, RESPONSES, input=TURNS[0]["content"], reasoning={"effort": "medium"})
    assert answer["usage"]["input_tokens"] == tokens
    assert answer["dial"]["template"] == {"reasoning_effort": "medium"}

    # What a request says itself stands, and the level then has no effect.
    own = {"chat_template_kwargs": {"reasoning_effort": "high"}, "reasoning_effort": "low"}
    _, answer, ignored = ask(app, messages=TURNS, **own, **GREEDY)
    assert (
        answer["usage"]["prompt_tokens"]
        == completed(app, effort_folder, reasoning_effort="high")[1]
    )
    assert ignored == "reasoning_effort"
    assert "dial" not in answer

    status, answer, _ = ask(app, messages=TURNS, reasoning_effort="lots")
    assert status == 400
    assert "reasoning_effort must be one of none, minimal" in answer["error"]["message"]


def test_a_stream_says_what_the_effort_did(
    serve_here: Callable[..., Any], hybrid_folder: Path
) -> None:
    sent = request(
        serve_here(hybrid_folder),
        CHAT,
        {"messages": TURNS, "reasoning_effort": "none", "stream": True, **GREEDY},
    )
    first = read(sent)[1].split(b"\n\n")[0].removeprefix(b"data: ")
    assert json.loads(first)["dial"]["template"] == {"enable_thinking": False}


def test_reasoning_effort_is_ignored_where_no_template_reads_it(
    serve_here: Callable[..., Any], hybrid_folder: Path
) -> None:
    for app, path, body in (
        (serve_here("miniature"), CHAT, {"messages": TURNS}),
        (serve_here(hybrid_folder), COMPLETION, {"prompt": "1+2?"}),
    ):
        status, answer, ignored = ask(app, path, reasoning_effort="low", max_tokens=1, **body)
        assert (status, ignored) == (200, "reasoning_effort")
        assert "dial" not in answer


def test_under_two_prompts_the_arguments_are_the_operators(
    serve_here: Callable[..., Any], hybrid_folder: Path
) -> None:
    prompts = PromptPair(PromptSettings(), PromptSettings({"enable_thinking": False}))
    app = serve_here(hybrid_folder, prompts=prompts)
    status, answer, _ = ask(app, messages=TURNS, chat_template_kwargs={"enable_thinking": True})
    assert status == 400
    assert "asks its model under two prompts" in answer["error"]["message"]
    _, _, ignored = ask(app, messages=TURNS, reasoning_effort="none", max_tokens=1)
    assert ignored == "reasoning_effort"


def test_a_dial_keeps_its_meaning_of_effort(
    serve_here: Callable[..., Any], hybrid_folder: Path, tiny_pair: Any, tmp_path: Path
) -> None:
    aligned = shutil.copytree(tiny_pair.aligned, tmp_path / "aligned")
    AutoTokenizer.from_pretrained(hybrid_folder).save_pretrained(aligned)
    app = serve_here(hybrid_folder, aligned=str(aligned))
    for level in ("none", "high"):
        _, answer, ignored = ask(app, messages=TURNS, reasoning_effort=level, max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == completed(app, hybrid_folder)[1]
        assert (answer["dial"]["lambda"], ignored) == (1.0, "reasoning_effort")
    _, answer, _ = ask(
        app, messages=TURNS, chat_template_kwargs={"enable_thinking": False}, max_tokens=1
    )
    expected = completed(app, hybrid_folder, enable_thinking=False)[1]
    assert answer["usage"]["prompt_tokens"] == expected
