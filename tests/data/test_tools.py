"""Tools in rows: read in every usual form, kept through Arrow, refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from flexalign.data import load_preferences, load_prompts, load_traces, strip_thinking
from flexalign.data.rendering import Rendering, tokenize_preferences, tokenize_rows
from flexalign.errors import DataError

USER = {"role": "user", "content": "1+2?"}
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **more}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(hybrid_tokenizer: Any) -> Any:
    hybrid_tokenizer.chat_template = TEMPLATE
    return hybrid_tokenizer


@pytest.mark.parametrize(
    ("message", "tools"),
    [
        (calling({"a": 1}), TOOLS),
        (calling('{"a": 1}'), json.dumps(TOOLS)),
        (calling({"a": 1}) | {"content": None}, [FUNCTION]),
        (calling({"a": 1}) | {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]}, TOOLS),
        (calling(0) | {"tool_calls": json.dumps(calling({"a": 1})["tool_calls"])}, TOOLS),
        (
            {"from": "gpt", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            TOOLS,
        ),
    ],
    ids=["plain", "text", "bare definition", "bare call", "calls as text", "older form"],
)
def test_every_form_of_a_call_is_the_same_row(tmp_path: Path, message: Any, tools: Any) -> None:
    (row,) = load_traces(write(tmp_path, {"messages": [USER, message], "tools": tools}))
    assert json.loads(row["tools"]) == TOOLS
    (said,) = row["completion"]
    assert json.loads(said.pop("tool_calls")) == calling({"a": 1})["tool_calls"]
    assert said == {"role": "assistant", "content": ""}


def test_arguments_keep_their_keys_and_null_through_the_data_set(
    tmp_path: Path, tokenizer: Any
) -> None:
    given = [{"b": None, "a": {"x": [1, "é"]}}, {"c": 2}, {}]
    rows = [{"messages": [USER, calling(each)], "tools": TOOLS} for each in given]
    data = load_traces(write(tmp_path, *rows))
    ids = tokenize_rows(data, tokenizer)["input_ids"]
    for each, found in zip(given, ids, strict=True):
        told = json.dumps(each, ensure_ascii=False)
        assert tokenizer.decode(found) == (
            f"<|im_start|>system\n{json.dumps(TOOLS)}<|im_end|><|im_start|>user\n1+2?<|im_end|>"
            f"<|im_start|>assistant\nadd({told})<|im_end|>"
        )


def test_tables_lose_what_they_fill_up_with_null(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"messages": [USER, calling({"a": 1})], "tools": TOOLS},
        {"messages": [USER, calling({"b": 2})], "tools": [{**TOOLS[0], "strict": True}]},
        {"messages": [USER, {"role": "assistant", "content": "3"}]},
    ]
    rows[0]["tools"][0]["function"]["parameters"]["properties"] = {"a": {"type": "number"}}
    rows[1]["tools"][0]["function"] = {"name": "add"}
    plain = load_traces(write(tmp_path, *rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert load_traces(tmp_path / "rows.parquet").to_list() == plain.to_list()


def test_preferences_are_rendered_with_their_tools(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": [USER], "tools": TOOLS, "chosen": [calling({"a": 1})]}
    row["rejected"] = [{"role": "assistant", "content": "4"}]
    data = load_preferences(write(tmp_path, row))
    (ids,) = tokenize_preferences(data, tokenizer)
    assert json.dumps(TOOLS) in tokenizer.decode(ids["prompt_ids"])
    assert tokenizer.decode(ids["chosen_ids"]) == 'add({"a": 1})<|im_end|>'
    assert tokenizer.decode(ids["rejected_ids"]) == "4<|im_end|>"


def test_a_call_is_an_answer_without_its_thinking(tmp_path: Path, tokenizer: Any) -> None:
    row = {"messages": [USER, calling({"a": 1}, reasoning_content="I add.")]}
    data = load_traces(write(tmp_path, row, row))
    said = tokenizer.decode(Rendering(tokenizer).row(data[0]).response_ids)
    assert said == '<think>I add.</think>add({"a": 1})<|im_end|>'
    stripped = strip_thinking(data)
    assert len(stripped) == 2
    said = tokenizer.decode(Rendering(tokenizer).row(stripped[0]).response_ids)
    assert said == 'add({"a": 1})<|im_end|>'


def test_a_prompt_that_opens_the_thinking_is_gone_on_from(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n{% if quick %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
        "{% endif %}",
    )
    rendering = Rendering(tokenizer)
    thought = {"prompt": [USER], "completion": [calling({}, reasoning_content="I add.")]}
    quick = {"prompt": [USER], "completion": [calling({})]}
    written = [tokenizer.decode(rendering.row(row).response_ids) for row in (thought, quick)]
    assert written == ["I add.</think>add({})<|im_end|>", "\n</think>\n\nadd({})<|im_end|>"]

    tokenizer.chat_template = "{% set quick = true %}" + tokenizer.chat_template
    rendering = Rendering(tokenizer)
    assert tokenizer.decode(rendering.row(quick).response_ids) == "add({})<|im_end|>"
    with pytest.raises(DataError, match="row 1: the response has a thinking, and the prompt has"):
        rendering.row(thought)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, calling("a")]}, r"messages\[1\].tool_calls\[0\] has arguments that"),
        ({"messages": [USER, calling({}) | {"tool_calls": {"a": 1}}]}, "that are not a list"),
        ({"messages": [USER, calling({})], "tools": "add"}, "'tools' is not a list"),
        ({"messages": [USER, calling({})], "tools": [{"type": "function"}]}, r"tools\[0\] has no"),
        ({"prompt": "1", "completion": "2", "tools": TOOLS}, "plain text has no place for tools"),
        ({"messages": [USER, calling({}), {"role": "tool", "content": ""}]}, "of role 'tool'"),
        ({"messages": [USER, calling({"a": "\ud83d"})]}, "half of a surrogate pair"),
    ],
)
def test_tools_of_another_form_are_named_by_line(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    good = {"messages": [USER, {"role": "assistant", "content": "3"}]}
    with pytest.raises(DataError, match=rf"(?s)1 of 2 rows.*line 2: .*{message}"):
        load_traces(write(tmp_path, good, row))


def test_prompts_with_tools_are_refused_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: it has tools, which are for rows that are train"):
        load_prompts(write(tmp_path, {"prompt": [USER], "tools": TOOLS}))
    result = {"role": "tool", "content": "3"}
    with pytest.raises(DataError, match="line 1: the prompt calls tools"):
        load_prompts(write(tmp_path, {"messages": [USER, calling({}), result]}))
    assert load_prompts(write(tmp_path, {"prompt": [USER], "tools": []}))["prompt"] == [[USER]]


def test_a_template_without_tools_is_refused_by_file_and_line(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    good = {"messages": [USER, {"role": "assistant", "content": "3"}]}
    path = write(tmp_path, good, {"messages": [USER, calling({})]})
    data = load_traces(path, places=True)
    with pytest.raises(DataError) as caught:
        tokenize_rows(data, tiny_tokenizer)
    assert str(caught.value) == (
        f"{path}, line 2: the chat template does not render calls of tools; take them out, or use "
        "a template that does."
    )
