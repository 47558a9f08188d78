"""Rows that call tools, in every chat template of the installed TRL: as the template writes them.

What a template renders of tools is asked of transformers' own `apply_chat_template`. A template that
leaves something out must be refused, and no other.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexalign.data.rendering import Rendering
from flexalign.errors import DataError

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(p for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
TOKEN = re.compile(r"</?[|｜]?[A-Za-z_▁]+[|｜]?>|\[/?[A-Za-z]+\]")
PLAIN = re.compile(r"</?[a-z_]+>")
"""Tags that are tokens of no special kind in real vocabularies: ``<think>``, ``</tool_call>``."""

QUESTION = {"role": "user", "content": "What is 2+3?"}
ARGUMENTS = {"first": "two", "more": [3]}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add_up",
            "description": "Adds numbers.",
            "parameters": {
                "type": "object",
                "properties": {"first": {"type": "string", "description": "The first."}},
                "required": ["first"],
            },
        },
    }
]
RESULT = {"role": "tool", "name": "add_up", "tool_call_id": "abcdefghi", "content": "It gives 5."}

TAKES = {
    "gemma4",
    "glm4moe",
    "gptoss",
    "lfm2_v2",
    "llama3_1",
    "nemotron_3_nano",
    "qwen2_5",
    "qwen3",
}
STOPS = {
    "gemma4": "<|tool_response>",
    "glm4moe": "<|observation|>",
    "gptoss": "<|call|>",
    "llama3_1": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "qwen3": "<|im_end|>",
}


def make_tokenizer(template: str) -> Any:
    """Bytes, and every token that the template names, special but for plain tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = sorted({*TOKEN.findall(template), "</s>", "<think>", "</think>"} - {"<s>"})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|of-nobody|>",
        pad_token="<|pad|>",
        extra_special_tokens=[name for name in named if not PLAIN.fullmatch(name)],
        chat_template=template,
    )
    tokenizer.add_tokens([AddedToken(n, special=False) for n in named if PLAIN.fullmatch(n)])
    return tokenizer


@pytest.fixture(params=TEMPLATES, ids=[path.stem for path in TEMPLATES])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = make_tokenizer(request.param.read_text(encoding="utf-8"))
    made.name_or_path = request.param.stem
    return made


def calling(arguments: Any, content: str = "") -> dict[str, Any]:
    function = {"name": "add_up", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def shown(tokenizer: Any, *messages: dict[str, Any], ask: bool = False, tools: Any = TOOLS) -> str:
    """What transformers renders; empty where the template fails on it."""
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    for given in (list(messages), in_parts):
        try:
            text = tokenizer.apply_chat_template(
                given, tools=tools, tokenize=False, add_generation_prompt=ask
            )
        except Exception:  # a template is a program, and may fail in any way
            continue
        if QUESTION["content"] in text:
            return str(text)
    return ""


def as_taken(tokenizer: Any, tools: Any) -> dict[str, Any]:
    """The call in the form that the template takes: its arguments as a mapping, or as text."""
    forms = [calling(ARGUMENTS), calling(json.dumps(ARGUMENTS))]
    return next((f for f in forms if "two" in shown(tokenizer, QUESTION, f, tools=tools)), forms[0])


def text_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a data set has it, with definitions and calls as JSON text."""

    def dumped(message: dict[str, Any]) -> dict[str, Any]:
        calls = message.get("tool_calls")
        return {**message, "tool_calls": json.dumps(calls)} if calls else message

    told = {side: [dumped(message) for message in row[side]] for side in ("prompt", "completion")}
    return {**told, "tools": json.dumps(row["tools"]) if row["tools"] else None}


def bare(text: str) -> str:
    """A text without white space and thinking tags, which stand in the prompt or in the response."""
    return re.sub(r"\s|</?think>|<\|/?think\|?>", "", text)


@pytest.mark.parametrize("tools", [TOOLS, None], ids=["with tools", "calls alone"])
def test_a_response_that_calls_tools_is_what_the_template_writes(
    tokenizer: Any, tools: Any
) -> None:
    call = as_taken(tokenizer, tools)
    asked = shown(tokenizer, QUESTION, ask=True, tools=tools)
    whole = shown(tokenizer, QUESTION, call, tools=tools)
    row = text_of({"prompt": [QUESTION], "completion": [calling(ARGUMENTS)], "tools": tools})
    if "two" not in whole or (tools and "add_up" not in asked):
        with pytest.raises(DataError, match=r"\Arow 1: [^\n]*(not render|leaves out)[^\n]*\.\Z"):
            Rendering(tokenizer).row(row)
        assert tokenizer.name_or_path not in TAKES
        return

    rendered = Rendering(tokenizer).row(row)
    assert rendered.prompt.text == asked
    said = tokenizer.decode(rendered.response_ids)
    *_, last = rendered.response_ids
    stop = tokenizer.convert_ids_to_tokens(last)
    assert stop == STOPS.get(tokenizer.name_or_path, stop)
    if whole.startswith(asked):
        assert whole[len(asked) :].rstrip() in (said, said.removesuffix(stop))
    else:  # the prompt opens a thinking, which the template writes otherwise in a conversation
        assert bare(asked + said) in (bare(whole), bare(whole) + stop)


def test_results_are_in_the_prompt_as_the_template_writes_them(tokenizer: Any) -> None:
    call = as_taken(tokenizer, TOOLS)
    asked = shown(tokenizer, QUESTION, call, RESULT, ask=True)
    answer = {"role": "assistant", "content": "It is 5."}
    given = {"prompt": [QUESTION, calling(ARGUMENTS), RESULT], "completion": [answer]}
    row = text_of({**given, "tools": TOOLS})
    if any(text not in asked for text in ("two", "It gives 5.")) or (
        "add_up" not in shown(tokenizer, QUESTION, ask=True)
    ):
        with pytest.raises(DataError, match=r"\Arow 1: "):
            Rendering(tokenizer).row(row)
        assert tokenizer.name_or_path not in TAKES
        return
    rendered = Rendering(tokenizer).row(row)
    assert rendered.prompt.text == asked
    assert rendered.prompt.ids == tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert "It is 5." in tokenizer.decode(rendered.response_ids)


def test_a_text_beside_a_call_is_trained_or_refused(tokenizer: Any) -> None:
    row = text_of(
        {"prompt": [QUESTION], "completion": [calling(ARGUMENTS, "I add.")], "tools": TOOLS}
    )
    whole = shown(tokenizer, QUESTION, {**as_taken(tokenizer, TOOLS), "content": "I add."})
    renders_both = "two" in whole and "I add." in whole
    if not renders_both or "add_up" not in shown(tokenizer, QUESTION, ask=True):
        with pytest.raises(DataError, match=r"\Arow 1: the chat template "):
            Rendering(tokenizer).row(row)
        return
    said = tokenizer.decode(Rendering(tokenizer).row(row).response_ids)
    assert said.count("I add.") == 1
    assert "two" in said
