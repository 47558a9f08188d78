import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from flexalign.data import data_fingerprint, load_preferences, load_prompts, load_traces
from flexalign.errors import ConfigError, DataError

USER = {"role": "user", "content": "1+2?"}
REPLY = {"role": "assistant", "content": "3"}
CONVERSATION = {"prompt": [USER], "completion": [REPLY]}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (CONVERSATION, CONVERSATION),
        ({"prompt": "1+2=", "completion": " 3"}, {"prompt": "1+2=", "completion": " 3"}),
        ({"messages": [USER, REPLY]}, CONVERSATION),
        (
            {"messages": [USER, REPLY, USER, REPLY]},
            {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
        ),
        (
            {"conversations": [{"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}]},
            CONVERSATION,
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "1+2?"},
                    {"from": "gpt", "value": "3"},
                ],
            },
            {
                "prompt": [{"role": "system", "content": "Be brief."}, USER],
                "completion": [REPLY],
            },
        ),
        ({"instruction": "1+2?", "input": "", "output": "3"}, CONVERSATION),
        (
            {"instruction": "Add.", "input": "1+2", "output": "3"},
            {"prompt": [{"role": "user", "content": "Add.\n\n1+2"}], "completion": [REPLY]},
        ),
        (
            {"instruction": "And 2+2?", "output": "4", "history": [["1+2?", "3"]]},
            {
                "prompt": [USER, REPLY, {"role": "user", "content": "And 2+2?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
        ),
        ({"instruction": "1+2?", "output": "3", "history": [], "text": "1+2? 3"}, CONVERSATION),
        ({"prompt": "1+2=", "response": " 3"}, {"prompt": "1+2=", "completion": " 3"}),
        ({"prompt": [USER], "response": "3"}, CONVERSATION),
        ({"prompt": [USER], "response": [REPLY]}, CONVERSATION),
        ({"question": "1+2?", "answer": "3"}, CONVERSATION),
        ({"problem": "1+2?", "solution": "3"}, CONVERSATION),
        (
            {"problem": "1+2?", "solution": "so 3", "answer": 3},
            {
                "prompt": [USER],
                "completion": [{"role": "assistant", "content": "so 3"}],
                "answer": "3",
            },
        ),
        (
            {"system": "Be brief.", "question": "1+2?", "answer": "3"},
            {
                "prompt": [{"role": "system", "content": "Be brief."}, USER],
                "completion": [REPLY],
            },
        ),
        (
            {"question": "1+2?", "reasoning_content": "I add.", "answer": "3"},
            {"prompt": [USER], "completion": [REPLY | {"reasoning_content": "I add."}]},
        ),
        (
            {"messages": [USER, REPLY | {"reasoning": "Mine."}], "reasoning_content": "I add."},
            {"prompt": [USER], "completion": [REPLY | {"reasoning_content": "Mine."}]},
        ),
        # The known answer, and a form that says the same, are no second response.
        (CONVERSATION | {"question": "1+2?", "answer": "3."}, CONVERSATION | {"answer": "3."}),
        ({"problem": "1+2?", "solution": "3", "messages": [USER, REPLY]}, CONVERSATION),
        ({"prompt": None, "completion": None, "messages": [USER, REPLY]}, CONVERSATION),
        ({"text": "1+2=3", "output": "3"}, {"prompt": "", "completion": "1+2=3"}),
        ({"text": "1+2=3"}, {"prompt": "", "completion": "1+2=3"}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+2?"}]}, REPLY]},
            CONVERSATION,
        ),
        (CONVERSATION | {"answer": 3}, CONVERSATION | {"answer": "3"}),
        (CONVERSATION | {"tokens": 1, "truncated": False}, CONVERSATION),
    ],
)
def test_every_known_form_becomes_prompt_and_completion(
    tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    dataset = load_traces(write_lines(tmp_path / "traces.jsonl", row, row))
    assert dataset.to_list() == [expected, expected]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "1+2="}, "1+2="),
        ({"prompt": [USER]}, [USER]),
        ({"problem": "1+2?", "solution": "count"}, [USER]),
        ({"question": "1+2?"}, [USER]),
        ({"instruction": "1+2?", "input": ""}, [USER]),
        ({"messages": [USER, REPLY]}, [USER]),
        ({"messages": [USER]}, [USER]),
        ({"prompt": "1+2?", "messages": [USER, REPLY]}, [USER]),
        ({"conversations": [{"from": "human", "value": "1+2?"}], "chosen": {}}, [USER]),
    ],
)
def test_every_known_form_gives_its_prompt(
    tmp_path: Path, row: dict[str, Any], prompt: Any
) -> None:
    assert load_prompts(write_lines(tmp_path / "p.jsonl", row))["prompt"][0] == prompt


def test_answers_are_kept_where_there_are_any(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"problem": "a"}, {"problem": "b", "answer": "7"})
    assert load_prompts(path)["answer"] == [None, "7"]
    assert "answer" not in load_prompts(write_lines(path, {"problem": "a"})).column_names


@pytest.mark.parametrize("form", ["jsonl", "json", "json lines", "parquet", "folder", "split"])
def test_every_container_holds_the_same_rows(tmp_path: Path, form: str) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1} é"} for i in range(5)]
    path = tmp_path / f"traces.{form.split()[0]}"
    dataset = Dataset.from_list(rows)
    match form:
        case "json":
            path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
        case "jsonl" | "json lines":
            path.write_text(
                "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8"
            )
        case "parquet":
            dataset.to_parquet(str(path))
        case "folder":
            dataset.save_to_disk(str(path))
        case "split":
            DatasetDict(train=dataset).save_to_disk(str(path))
    assert load_traces(path).to_list() == rows


GOOD = json.dumps({"prompt": "1+2=", "completion": "3"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD[:20], r"line 3: cut off: the file ends inside this line"),
        ('{"prompt": "é'.encode()[:-1], r"line 3: cut off"),
        (b"\xff\xfe\n", r"line 3: not UTF-8 \(byte 1 of the line\)"),
        (b"{'prompt': 1}\n", r"line 3: not JSON \(Expecting property name.*, column 2\)"),
        (b"\n \t\n" + b"{}\n" + GOOD, r"line 5: unknown fields \(none\)"),
        (b"[1, 2]\n", r"line 3: a list where a row with named fields is expected"),
        (b'{"prompt": "a", "completion": " "}\n', r"line 3: 'completion' is empty"),
        (b'{"prompt": "a", "completion": 3}\n', r"line 3: 'completion' is a int, not text"),
        (b'{"prompt": "a"}\n', r"line 3: unknown fields prompt; expected prompt and completion"),
        (b'{"instruction": "a"}\n', r"line 3: no field 'output'"),
        (b'{"messages": []}\n', r"line 3: 'messages' is not a list with at least one"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', r"ends with a message of role"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', r"no message before"),
        (b'{"messages": [{"role": "ai", "content": "a"}]}\n', r"\[0\] has the unknown role 'ai'"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}\n', r"unknown role \['user'\]"),
        (b'{"messages": [{"role": "user"}]}\n', r"messages\[0\] has no text"),
        (b'{"messages": ["1+2?", "3"]}\n', r"messages\[0\] is not a message with a role"),
        (
            b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
            r"line 3: of prompt and completion one is text and the other is messages",
        ),
        (
            b'{"prompt": [{"role": "user", "content": "a"}],'
            b' "completion": [{"role": "user", "content": "b"}]}\n',
            r"line 3: the completion has a message of role 'user'",
        ),
        (
            b'{"instruction": "a", "output": "b", "history": [["c", "d"], ["e"]]}\n',
            r"line 3: history\[1\] is not a pair of an instruction and its response",
        ),
        (
            b'{"instruction": "a", "output": "b", "history": "c"}\n',
            r"line 3: 'history' is not a list of pairs",
        ),
        (
            b'{"prompt": "a", "completion": "b", "messages": [{"role": "user", "content": "a"},'
            b' {"role": "assistant", "content": "c"}]}\n',
            r"line 3: prompt and completion and messages give two different responses; take one "
            r"out, or name the columns that are meant by `columns`",
        ),
        (
            b'{"prompt": "a", "completion": "b", "response": "c"}\n',
            r"line 3: prompt and completion and prompt and response give two different",
        ),
        (
            b'{"question": "a", "answer": "4", "response": "It is 4."}\n',
            r"line 3: question and answer and response give two different responses",
        ),
        (
            b'{"prompt": "a", "response": "b", "reasoning_content": "c"}\n',
            r"line 3: plain text has no place for the reasoning_content beside it",
        ),
        (b'{"text": "half \\ud83d pair"}\n', r"'text' has half of a surrogate pair"),
        (
            b'{"conversations": [], "chosen": [], "rejected": []}\n',
            r"a preference pair has no single response; keep one as completion",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
            r"messages\[0\] has parts that are not text",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant",'
            b' "content": "b", "tool_calls": [{}]}]}\n',
            r"messages\[1\].tool_calls\[0\] has no name of a function",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant",'
            b' "content": "b"}]}\n',
            r"line 3: plain text and conversations are mixed",
        ),
    ],
)
def test_a_bad_row_is_named_by_line_and_stops_the_run_unless_told(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(GOOD * 2 + line)
    with pytest.raises(DataError, match=message) as caught:
        load_traces(path)
    assert str(path) in str(caught.value)
    assert "--skip-bad-rows" in str(caught.value)
    with pytest.warns(UserWarning, match=r"(?s)skipped: 1 of \d rows.*" + message):
        dataset = load_traces(path, skip_bad_rows=True)
    assert len(dataset) == 2 + line.endswith(GOOD)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", CONVERSATION, *[{"text": ""}] * 9)
    with pytest.raises(DataError, match=r"(?s)9 of 10 rows.*line 6.*and 4 more") as caught:
        load_traces(path)
    assert "line 7" not in str(caught.value)


def test_a_cut_off_list_keeps_the_rows_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "traces.json"
    text = json.dumps([CONVERSATION] * 3, indent=1)
    path.write_text(text[:-60], encoding="utf-8")
    third = text[: text.rindex('"prompt"')].count("\n")
    with pytest.raises(DataError, match=rf"1 of 3 rows.*\n  line {third}: not JSON"):
        load_traces(path)
    path.write_text(text[: text.rindex("},") + 2], encoding="utf-8")
    with pytest.raises(DataError, match="cut off: the file ends inside its list"):
        load_traces(path)
    path.write_text(text.replace("},\n {", "}\n {", 1), encoding="utf-8")
    with pytest.raises(DataError, match="no comma after this row"):
        load_traces(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "the data set is empty"),
        ("blank.jsonl", b"\n\n", "the data set is empty"),
        ("empty.json", b"[]", "the data set is empty"),
        ("all.jsonl", b"{}\n{}\n", "No row is usable"),
        ("latin.json", '[\n{"text": "é"}]'.encode("latin-1"), "line 2 is not UTF-8"),
        ("words.json", b"hello", "this is not JSON"),
        ("rows.txt", b"a,b", "this kind of file is not known; give JSONL"),
        ("rows.parquet", b"PAR1 no", "cannot be read"),
    ],
)
def test_an_unusable_file_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError, match=message):
            load_traces(tmp_path / name, skip_bad_rows=skip)


def test_a_folder_must_be_one_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a data set written by"):
        load_traces(tmp_path)
    rows = Dataset.from_list([{"text": "a"}])
    DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"the splits train, test; name one of them"):
        load_traces(tmp_path / "two")
    assert load_traces(tmp_path / "two" / "test")["completion"] == ["a"]
    next((tmp_path / "two" / "test").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(DataError, match="this data set cannot be read"):
        load_traces(tmp_path / "two" / "test")


def test_a_prompt_that_is_already_answered_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is left to answer"):
        load_prompts(write_lines(tmp_path / "p.jsonl", {"prompt": [USER, REPLY]}))
    with pytest.raises(DataError, match="there is no message before the response"):
        load_prompts(write_lines(tmp_path / "p.jsonl", {"messages": [REPLY]}))
    with pytest.raises(DataError, match="unknown fields text; expected prompt, problem"):
        load_prompts(write_lines(tmp_path / "p.jsonl", {"text": "1+2="}))


def test_columns_of_other_names_are_read_as_the_known_ones(tmp_path: Path) -> None:
    given = {"query": "1+2=", "reply": " 3", "answer": "9", "completion": "no"}
    path = write_lines(tmp_path / "t.jsonl", given, given)
    columns = {"prompt": "query", "completion": "reply"}
    rows = [{"prompt": "1+2=", "completion": " 3"}] * 2
    loaded = load_traces(path, columns=columns)
    assert loaded.to_list() == rows
    assert data_fingerprint(loaded) == data_fingerprint(Dataset.from_list(rows))
    as_messages = load_traces(path, columns={"question": "query", "answer": "reply"})
    assert as_messages["prompt"][0] == [{"role": "user", "content": "1+2="}]
    assert load_prompts(path, columns={"prompt": "query"})["prompt"] == ["1+2="] * 2
    pairs = {"prompt": "query", "chosen": "reply", "rejected": "completion"}
    assert load_preferences(path, columns=pairs)[0] == {
        "prompt": "1+2=",
        "chosen": " 3",
        "rejected": "no",
    }


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"promt": "query"}, ConfigError, "unknown key 'columns.promt'; did you mean 'columns.pro"),
        ({"prompt": 3}, ConfigError, "columns.prompt must be the name of a column, got 3"),
        ({}, ConfigError, "columns is empty"),
        (
            {"prompt": "query", "completion": "repply"},
            DataError,
            "no row has the column 'repply' that columns.completion names; did you mean 'reply'?",
        ),
        ({"prompt": "query"}, DataError, "line 1: unknown fields prompt; expected prompt and"),
        (
            {"prompt": "query", "completion": "late"},
            DataError,
            "1 of 2 rows cannot be used:\n  line 1: unknown fields prompt; expected",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    tmp_path: Path, columns: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"query": "1+2=", "reply": " 3"}
    path = write_lines(tmp_path / "t.jsonl", given, given | {"late": "3"})
    with pytest.raises(error) as caught:
        load_traces(path, columns=columns)
    assert message in str(caught.value)


def test_the_fingerprint_follows_contents_and_order_alone() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    one = data_fingerprint(Dataset.from_list(rows))
    assert one == data_fingerprint(Dataset.from_list([dict(reversed(r.items())) for r in rows]))
    assert one != data_fingerprint(Dataset.from_list(rows[::-1]))
    assert one != data_fingerprint(Dataset.from_list(rows[:1]))
    assert len(one) == 16


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_and_conversations_become_prompt_chosen_rejected(tmp_path: Path) -> None:
    text = {"prompt": "1+1=", "chosen": " 2", "rejected": " 3"}
    assert list(load_preferences(write(tmp_path, text))) == [text]
    explicit = {"prompt": [USER], "chosen": [say("2")], "rejected": [say("3")]}
    implicit = {"chosen": [USER, say("2")], "rejected": [USER, say("3")]}
    assert list(load_preferences(write(tmp_path, explicit, implicit))) == [explicit, explicit]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "1+1=", "completion": " 2"}, "expected chosen and rejected"),
        ({"chosen": " 2", "rejected": " 3"}, "needs a prompt"),
        ({"chosen": [say("2")], "rejected": [say("3")]}, "no message before the responses"),
        ({"prompt": "1", "chosen": [say("2")], "rejected": " 3"}, "some are text"),
        (
            {"chosen": [USER, say("2")], "rejected": [say("?"), USER, say("3")]},
            "differ before their last message",
        ),
    ],
)
def test_other_rows_are_named_by_line(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"(?s)1.*{reason}"):
        load_preferences(write(tmp_path, row))
