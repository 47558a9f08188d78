"""Tools: described by the chat template, and calls read by transformers from what a model writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from trl.chat_template_utils import qwen3_chat_template, qwen3_template

from asgi import read, request
from flexalign.data.prompting import PromptSettings
from flexalign.generation.text import ResponseText
from flexalign.models.prompted import PromptPair
from flexalign.serving.tools import ToolParser

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
TURNS = [{"role": "user", "content": "one and two"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": "é"}}\n</tool_call>'
WRITTEN = f"<think>\nsum\n</think>\n\nI add.\n{CALL}"
PLAIN = "<think>\nsum\n</think>\n\nsix < seven <tool"
ASKED: dict[str, Any] = {"messages": TURNS, "tools": [TOOL], "temperature": 0, "max_tokens": 200}


@pytest.fixture(scope="module")
def taught(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, tiny_model: Callable[..., Any]
) -> Path:
    """A model that has learnt two answers by heart: a call where there are tools, else a text."""
    folder = tmp_path_factory.mktemp("taught")
    tiny_tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = qwen3_template
    tokenizer.save_pretrained(folder)

    rows = []
    for tools, text in (([TOOL], WRITTEN), (None, PLAIN)):
        prompt = tokenizer.apply_chat_template(
            TURNS, tools=tools, add_generation_prompt=True, tokenize=False
        )
        ids, whole = (
            tokenizer(one, add_special_tokens=False, return_tensors="pt")["input_ids"]
            for one in (prompt, prompt + text + "<|im_end|>")
        )
        labels = whole.clone()
        labels[:, : ids.shape[1]] = -100
        rows.append((whole, labels))

    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = sum(model(ids, labels=labels).loss for ids, labels in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.05
    model.eval().save_pretrained(folder)
    return folder


def untaught(folder: Path, place: Path, **changes: Any) -> Path:
    """The same model with another tokenizer configuration."""
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(place)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(place)
    return place


def ask(app: Any, **body: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the status, the answer and the headers."""
    sent = request(app, CHAT, body)
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    status, content = read(sent)
    return status, json.loads(content), headers


def streamed(app: Any, **body: Any) -> tuple[list[dict[str, Any]], str | None]:
    """Return the deltas of a stream and why it ended."""
    _, content = read(request(app, CHAT, {**body, "stream": True}))
    events = [event.removeprefix("data: ") for event in content.decode().split("\n\n")]
    choices = [json.loads(event)["choices"][0] for event in events if event.startswith("{")]
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


def test_a_call_is_read(serve_here: Callable[..., Any], taught: Path) -> None:
    app = serve_here(taught)
    status, answer, headers = ask(app, **ASKED)
    assert status == 200
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning"].strip(), message["content"].strip()) == ("sum", "I add.")
    [call] = message["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    assert json.loads(call["function"]["arguments"]) == {"a": 3, "b": "é"}
    assert call["id"].startswith("call_")
    assert "x-flexalign-tool-calls" not in headers


@pytest.mark.parametrize("has_tools", [True, False])
def test_a_stream_holds_back_what_may_be_a_call(
    serve_here: Callable[..., Any], taught: Path, has_tools: bool
) -> None:
    app = serve_here(taught)
    asked = ASKED if has_tools else ASKED | {"tools": []}
    _, answer, _ = ask(app, **asked)
    expected = answer["choices"][0]["message"]
    deltas, finish = streamed(app, **asked)
    assert (
        finish == answer["choices"][0]["finish_reason"] == ("tool_calls" if has_tools else "stop")
    )

    def joined(key: str) -> str:
        return "".join(delta.get(key) or "" for delta in deltas)

    assert joined("reasoning") == expected["reasoning"]
    assert joined("content").strip() == expected["content"].strip()
    assert "<tool_call>" not in joined("content")
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"] for call in calls] == [
        call["function"] for call in expected.get("tool_calls", [])
    ]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    if has_tools:  # the text before the call has come before the end
        assert sum("content" in delta for delta in deltas[1:]) > 1


def test_text_that_is_no_call_is_content(serve_here: Callable[..., Any], taught: Path) -> None:
    """The marker's beginning at the answer's end is held back, and sent at last."""
    app = serve_here(taught)
    _, answer, _ = ask(app, **ASKED | {"tool_choice": "none"})
    message = answer["choices"][0]["message"]
    assert message["content"].strip() == "six < seven <tool"
    assert "tool_calls" not in message
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_an_answer_that_is_cut_off_calls_nothing(
    serve_here: Callable[..., Any], taught: Path
) -> None:
    app = serve_here(taught)
    _, answer, _ = ask(app, **ASKED | {"max_tokens": 40})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert "tool_calls" not in answer["choices"][0]["message"]
    deltas, finish = streamed(app, **ASKED | {"max_tokens": 40})
    assert finish == "length"
    content = "".join(delta.get("content") or "" for delta in deltas)
    assert content == answer["choices"][0]["message"]["content"]


def test_calls_and_results_are_rendered_as_transformers_renders_them(
    serve_here: Callable[..., Any], taught: Path
) -> None:
    function = {"name": "add", "arguments": {"a": 3}}
    call = {"id": "c", "type": "function", "function": function}
    turns = [
        *TURNS,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "seven"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(taught)
    expected = tokenizer.apply_chat_template(
        turns, tools=[TOOL], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    sent = json.loads(json.dumps(turns))
    sent[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 3}'  # as OpenAI's clients send them
    sent[1]["content"] = None
    status, answer, _ = ask(serve_here(taught), **ASKED | {"messages": sent, "max_tokens": 1})
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == len(expected)


def test_a_template_that_reads_no_tools_is_named(serve_here: Callable[..., Any]) -> None:
    app = serve_here("miniature")
    status, answer, _ = ask(app, **ASKED)
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert "chat template does not read tools" in answer["error"]["message"]
    assert ask(app, **ASKED | {"tool_choice": "none", "max_tokens": 1})[0] == 200
    assert ask(app, **ASKED | {"tools": [], "max_tokens": 1})[0] == 200


def test_a_call_that_nothing_can_read_is_text_and_a_header_says_so(
    serve_here: Callable[..., Any], taught: Path, tmp_path: Path
) -> None:
    app = serve_here(untaught(taught, tmp_path, response_template=None))
    _, answer, headers = ask(app, **ASKED)
    assert headers["x-flexalign-tool-calls"] == "text"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"].endswith(CALL)
    sent = request(app, CHAT, {**ASKED, "stream": True})
    assert (b"x-flexalign-tool-calls", b"text") in sent[0]["headers"]


def test_the_response_template_of_a_known_chat_template_is_trls(
    taught: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        untaught(taught, tmp_path, response_template=None, chat_template=qwen3_chat_template)
    )
    parser = ToolParser(tokenizer, ResponseText(tokenizer))
    parser.require_tools()
    assert parser.template == qwen3_template
    assert parser.marker == "<tool_call>"
    read_calls = parser.parse(CALL + "<|im_end|>", "<|im_start|>assistant\n", [TOOL])
    assert read_calls is not None
    assert read_calls.content is None
    assert read_calls.calls[0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    "text",
    [
        "six",
        "<tool_call>\n{not json\n</tool_call>",
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        "<tool_call>\n3\n</tool_call>",
    ],
)
def test_what_is_no_call_is_not_read_as_one(taught: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(taught)
    parser = ToolParser(tokenizer, ResponseText(tokenizer))
    assert parser.parse(text, "<|im_start|>assistant\n", [TOOL]) is None


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools must be a list of at most 128 tools"),
        ([TOOL] * 129, "tools must be a list of at most 128 tools"),
        ([3], "tools[0] must be a function with a name"),
        ([TOOL, {"type": "function", "function": {}}], "tools[1] must be a function with a name"),
        ([TOOL | {"type": "custom"}], 'tools[0].type must be "function", got "custom".'),
    ],
)
def test_tools_that_are_none_are_named(
    serve_here: Callable[..., Any], taught: Path, tools: Any, message: str
) -> None:
    status, answer, _ = ask(serve_here(taught), **ASKED | {"tools": tools})
    assert status == 400
    assert answer["error"]["message"].startswith(message)


def test_under_two_prompts_tools_are_refused(serve_here: Callable[..., Any], taught: Path) -> None:
    app = serve_here(taught, prompts=PromptPair(PromptSettings(), PromptSettings(system="brief")))
    status, answer, _ = ask(app, **ASKED)
    assert status == 400
    assert "two prompts" in answer["error"]["message"]
