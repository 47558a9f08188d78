"""Readers of data formats; all rows become TRL's prompt–completion form.

The formats are TRL's (`prompt` + `completion`, `messages`, `text`), ShareGPT (`conversations` of
`from`/`value`), Alpaca (`instruction`, `input`, `output`, `history`), and pairs of other names
(`prompt` + `response`, `question` + `answer`, `problem` + `solution`). Every row becomes a `prompt`
and a `completion`, both messages or both text, so that TRL's completion-only loss counts the
response only.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from flexalign.data.columns import FIELDS, check_columns, renamed, require_columns
from flexalign.data.files import PLACE, BadRow, Row, Unusable, read_rows
from flexalign.data.template import REASONING_KEYS, reasoning_of
from flexalign.data.tools import CALLS, read_calls, read_tools
from flexalign.errors import DataError

# One row of any known format.

Messages = list[dict[str, str]]
"""A conversation in TRL's form: dictionaries with `role` and `content`."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
}
_TRACE_FORMS = (
    "prompt and completion (or response), messages, conversations (ShareGPT), "
    "instruction and output (Alpaca), problem and solution, question and answer, or text"
)
_PROMPT_FORMS = "prompt, problem, question, instruction, messages or conversations"

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("problem", "solution"),
)
"""The fields of the forms of a prompt with its response; the first one that a row has is read."""

_LAST = (("question", "answer"), ("text",))
"""Forms that are read only where a row has no other: `answer` beside another response is the known
answer, and `text` is the rendered row."""

_RESPONSES = ("completion", "response", "output")
"""Fields that are a response whatever stands beside them."""


def trace_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row as a prompt with its response.

    Returns:
        `prompt` and `completion`, both messages or both text; `answer` if the row has one; `tools`
        as JSON text if it has some; and `response_ids`, `rendering` and `truncated` where the
        response was sampled.

    Raises:
        Unusable: If the row has no known form, a part is missing or empty, or two forms have
            different responses.
    """
    has_pair = "prompt" in row and ("completion" in row or "response" in row)
    if "chosen" in row and "rejected" in row and not has_pair:
        raise Unusable("a preference pair has no single response; keep one as completion")

    forms = [form for form in _PAIRS if all(name in row for name in form)]
    forms = forms or [form for form in _LAST if all(name in row for name in form)][:1]
    if not forms:
        if "instruction" in row:
            _text(row, "output")  # raises, and names the missing field
        raise Unusable(f"unknown fields {_names(row)}; expected {_TRACE_FORMS}")
    prompt, completion = _pair(row, forms[0])
    _require_one_response(row, forms, completion)

    if isinstance(completion, list) and any(m["role"] == "user" for m in completion):
        raise Unusable("the completion has a message of role 'user'")
    if isinstance(prompt, list) and not prompt:
        raise Unusable("there is no message before the response")
    if isinstance(completion, list) and len(completion) > 1:
        raise Unusable(
            f"the completion has {len(completion)} messages; a row trains one response, so put "
            "those before the last into the prompt"
        )
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise Unusable(f"the completion has a message of role {completion[0]['role']!r}")

    told = {} if forms[0] == ("question", "answer") else _answer(row)
    return (
        {"prompt": prompt, "completion": _with_thinking(row, completion)}
        | told
        | _tools(row, prompt)
        | _sampled(row)
    )


def _pair(row: dict[str, Any], form: tuple[str, ...]) -> tuple[str | Messages, str | Messages]:
    """Read the prompt and the response of a row in one form.

    Raises:
        Unusable: If a part is missing or empty, or the two do not fit.
    """
    match form:
        case ("prompt", name):
            prompt, completion = _text_or_messages(row, "prompt"), _text_or_messages(row, name)
            if name == "response" and isinstance(prompt, list) and isinstance(completion, str):
                return prompt, [_message("assistant", completion)]
            if isinstance(prompt, str) != isinstance(completion, str):
                raise Unusable(f"of prompt and {name} one is text and the other is messages")
            return prompt, completion
        case ("instruction", name):
            return _alpaca_prompt(row), [_message("assistant", _text(row, name))]
        case ("problem" | "question" as asked, name):
            prompt = _with_system(row, [_message("user", _text(row, asked))])
            return prompt, [_message("assistant", _text(row, name))]
        case ("text",):
            return "", _text(row, "text")
    messages = _conversation(row, form)
    if messages[-1]["role"] != "assistant":
        raise Unusable(
            f"the conversation ends with a message of role {messages[-1]['role']!r}, "
            "not with the assistant's response"
        )
    return messages[:-1], messages[-1:]


def _require_one_response(
    row: dict[str, Any], forms: Sequence[tuple[str, ...]], completion: str | Messages
) -> None:
    """Check that no other field of a row has another response.

    Raises:
        Unusable: If one does; it names both.
    """
    said = _said(completion)
    first, *others = forms
    for other in others:
        try:
            _, rival = _pair(row, other)
        except Unusable:  # what cannot be read is no second response
            continue
        if _said(rival) != said:
            raise Unusable(_contradiction(first, " and ".join(other)))
    for name in _RESPONSES:
        value = row.get(name)
        if not isinstance(value, str) or any(name in form for form in forms):
            continue
        # A row's whole text has its response in it.
        is_same = value.strip() in said if first == ("text",) else value.strip() in ("", said)
        if not is_same:
            raise Unusable(_contradiction(first, name))


def _contradiction(form: tuple[str, ...], other: str) -> str:
    return (
        f"{' and '.join(form)} and {other} give two different responses; take one out, or name the "
        "columns that are meant by `columns`"
    )


def _said(completion: str | Messages) -> str:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return text.strip()


def _with_thinking(row: dict[str, Any], completion: str | Messages) -> str | Messages:
    """Give a response the thinking that its row has beside it, as `reasoning_content`.

    Raises:
        Unusable: If the response is plain text, which has no place for it.
    """
    thinking = row.get("reasoning_content")
    if not isinstance(thinking, str) or not thinking.strip():
        return completion
    if isinstance(completion, str):
        raise Unusable(
            "plain text has no place for the reasoning_content beside it; give messages, or "
            "question and answer"
        )
    if reasoning_of(completion[-1]):
        return completion
    thinking = _valid("reasoning_content", thinking)
    return [*completion[:-1], completion[-1] | {"reasoning_content": thinking}]


def _tools(row: dict[str, Any], prompt: str | Messages) -> dict[str, str]:
    """Read the tools that a response may call.

    Raises:
        Unusable: If they have another form, or the prompt is plain text.
    """
    tools = read_tools(row)
    if tools and isinstance(prompt, str):
        raise Unusable("plain text has no place for tools; give messages")
    return tools


def preference_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row as a prompt with a chosen and a rejected response.

    If a row has no `prompt` and its responses are conversations, the messages before the last
    one are the prompt; they must be the same in both.

    Returns:
        `prompt`, `chosen` and `rejected`, all messages or all text, and `tools` as JSON text if
        the row has some.

    Raises:
        Unusable: If the row has another form, or a part is missing or empty.
    """
    if "chosen" not in row or "rejected" not in row:
        raise Unusable(f"unknown fields {_names(row)}; expected chosen and rejected")
    chosen, rejected = _text_or_messages(row, "chosen"), _text_or_messages(row, "rejected")
    if "prompt" in row:
        prompt = _text_or_messages(row, "prompt")
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, other, rejected = chosen[:-1], chosen[-1:], rejected[:-1], rejected[-1:]
        if prompt != other:
            raise Unusable("chosen and rejected differ before their last message")
    else:
        raise Unusable("a preference in plain text needs a prompt")

    if len({isinstance(part, str) for part in (prompt, chosen, rejected)}) > 1:
        raise Unusable("of prompt, chosen and rejected some are text and others messages")
    if isinstance(prompt, list) and not prompt:
        raise Unusable("there is no message before the responses")
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair | _tools(row, prompt)


def prompt_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row as a prompt to be answered.

    Returns:
        `prompt`, messages or text, and `answer` if the row has one.

    Raises:
        Unusable: If the row has no known form, or its prompt is missing or empty.
    """
    prompt: str | Messages
    form = next((name for name in ("messages", "conversations") if name in row), None)
    if form is not None:
        messages = _conversation(row, (form,))
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not prompt:
            raise Unusable("there is no message before the response")
    elif "prompt" in row:
        prompt = _text_or_messages(row, "prompt")
    elif "instruction" in row:
        prompt = _alpaca_prompt(row)
    elif key := next((key for key in ("problem", "question") if key in row), None):
        prompt = _with_system(row, [_message("user", _text(row, key))])
    else:
        raise Unusable(f"unknown fields {_names(row)}; expected {_PROMPT_FORMS}")

    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with the assistant's message; nothing is left to answer")
    if read_tools(row):
        raise Unusable("it has tools, which are for rows that are trained; take them out")
    if isinstance(prompt, list) and any(CALLS in message for message in prompt):
        raise Unusable("the prompt calls tools, which is for rows that are trained")
    return {"prompt": prompt} | _answer(row)


def _conversation(row: dict[str, Any], form: tuple[str, ...]) -> Messages:
    (key,) = form
    return _with_system(row, _messages(row, key))


def _text_or_messages(row: dict[str, Any], key: str) -> str | Messages:
    return _messages(row, key) if isinstance(row[key], list) else _text(row, key)


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise Unusable(f"no field {key!r}")
    value = row[key]
    if not isinstance(value, str):
        raise Unusable(f"{key!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise Unusable(f"{key!r} is empty")
    return _valid(repr(key), value)


def _valid(where: str, text: str) -> str:
    """Return a text that can be encoded as UTF-8, which Arrow needs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(f"{where} has half of a surrogate pair (a broken \\u escape)") from None
    return text


def _messages(row: dict[str, Any], key: str) -> Messages:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise Unusable(f"{key!r} is not a list with at least one message")
    return [_normal_message(f"{key}[{index}]", message) for index, message in enumerate(value)]


def _normal_message(where: str, message: Any) -> dict[str, str]:
    """Return a message with `role`, `content`, its thinking, its calls, and other fields of text."""
    if not isinstance(message, dict):
        raise Unusable(f"{where} is not a message with a role and a content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise Unusable(f"{where} has the unknown role {role!r}")
    calls = read_calls(where, message)

    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = _joined_parts(where, content)
    if content is None and (calls or reasoning_of(message)):
        content = ""
    if not isinstance(content, str):
        raise Unusable(f"{where} has no text")

    known = {"role", "from", "content", "value", CALLS, *REASONING_KEYS}
    extras = {
        key: value for key, value in message.items() if key not in known and isinstance(value, str)
    }
    if thinking := reasoning_of(message):
        extras["reasoning_content"] = _valid(f"{where}'s thinking", thinking)
    if not content.strip() and not thinking and not calls and _ROLES[role] != "tool":
        raise Unusable(f"{where} is empty")
    return _message(_ROLES[role], _valid(where, content)) | extras | calls


def _joined_parts(where: str, parts: list[Any]) -> str:
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
        raise Unusable(f"{where} has parts that are not text")
    return "".join(str(part.get("text", "")) for part in parts)


def _alpaca_prompt(row: dict[str, Any]) -> Messages:
    instruction, context = _text(row, "instruction"), row.get("input")
    if isinstance(context, str) and context.strip():
        instruction = f"{instruction}\n\n{_valid('input', context)}"
    return _with_system(row, [*_history(row), _message("user", instruction)])


def _history(row: dict[str, Any]) -> Messages:
    """Read Alpaca's `history`, the earlier turns: pairs of an instruction and its response.

    Raises:
        Unusable: If it has another form.
    """
    turns = row.get("history") or []
    if not isinstance(turns, list):
        raise Unusable("'history' is not a list of pairs, each an instruction and its response")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2 or not all(_is_said(said) for said in turn):
            raise Unusable(f"history[{index}] is not a pair of an instruction and its response")
        user, assistant = (_valid(f"history[{index}]", said) for said in turn)
        messages += [_message("user", user), _message("assistant", assistant)]
    return messages


def _is_said(said: Any) -> bool:
    return isinstance(said, str) and bool(said.strip())


def _with_system(row: dict[str, Any], messages: Messages) -> Messages:
    """Put a row's `system` field before its messages, unless they begin with a system message."""
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        return [_message("system", _valid("system", system)), *messages]
    return messages


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _answer(row: dict[str, Any]) -> dict[str, str]:
    """Return a row's reference answer as text; empty if there is none."""
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return {}
    if isinstance(answer, str) and not answer.strip():  # an empty cell of a table
        return {}
    return {"answer": str(answer)}


def _sampled(row: dict[str, Any]) -> dict[str, Any]:
    """Read the fields that `flexalign sample` writes beside a response's text.

    `rendering` is kept as JSON text, because a column must have the same type in all rows.
    """
    told: dict[str, Any] = {}
    ids = row.get("response_ids")
    if ids is not None:
        is_ids = isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
        if not is_ids:
            raise Unusable("'response_ids' is not a list of token ids")
        told["response_ids"] = ids
        if isinstance(row.get("rendering"), dict):
            told["rendering"] = json.dumps(row["rendering"], sort_keys=True)
    if row.get("truncated") in (True, "true", "True"):  # a table of text has no other
        told["truncated"] = True
    return told


def _names(row: dict[str, Any]) -> str:
    return _listed(sorted(map(str, row))) or "(none)"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8])


# Whole files.

_SHOWN = 5
"""How many bad rows an error message names."""


def load_traces(
    path: str | Path,
    *,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    places: bool = False,
) -> Dataset:
    """Load prompts with their responses.

    In a conversation the last message must be the assistant's: it is the completion, and the
    messages before it are the prompt. A row with `text` only has an empty prompt, and the text is
    its completion.

    Args:
        path: A JSONL, JSON or CSV file (also with gzip, ``.gz``), a Parquet file, a folder of such
            shards, or a saved Hugging Face data set; ``folder/train`` is one of its splits.
        skip_bad_rows: Leave bad rows out with a warning that counts them; otherwise they raise.
        columns: The file's own names for fields, such as ``{"prompt": "query", "completion":
            "reply"}``; all other columns are then left out.
        places: Add the column `place`, each row's file and line, which errors about the row name.

    Returns:
        A data set with `prompt` and `completion`, both lists of messages or both text. Where any
        row has them, it also has the columns `answer` (text or None), `tools` (JSON text or None)
        and, of sampled responses, `response_ids`, `rendering` and `truncated`. The `tool_calls` of
        messages are JSON text.

    Raises:
        ConfigError: If `columns` names an unknown field.
        DataError: If the file cannot be read, has no usable row, or has bad rows (the first few
            are named by line) and `skip_bad_rows` is not set.
    """
    return _load(Path(path), trace_row, skip_bad_rows, columns, places)


def load_preferences(
    path: str | Path,
    *,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    places: bool = False,
) -> Dataset:
    """Load prompts with a chosen and a rejected response, as DPO takes them.

    Args:
        path: As in `load_traces`.
        skip_bad_rows: As in `load_traces`.
        columns: As in `load_traces`.
        places: As in `load_traces`.

    Returns:
        A data set with `prompt`, `chosen` and `rejected`, all lists of messages or all text, and
        `tools` as in `load_traces`.

    Raises:
        ConfigError: As in `load_traces`.
        DataError: As in `load_traces`.
    """
    return _load(Path(path), preference_row, skip_bad_rows, columns, places)


def load_prompts(
    path: str | Path,
    *,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Load prompts to be answered.

    A `prompt` that is text is given to the model unchanged. `problem`, `question`, `instruction`
    (with `input` and `history`), `messages` and `conversations` become messages for the chat
    template. A response that a row already has is left out.

    Args:
        path: As in `load_traces`.
        skip_bad_rows: As in `load_traces`.
        columns: As in `load_traces`.

    Returns:
        A data set with `prompt` (messages or text) and, where any row has one, `answer`.

    Raises:
        ConfigError: As in `load_traces`.
        DataError: As in `load_traces`.
    """
    return _load(Path(path), prompt_row, skip_bad_rows, columns)


def data_fingerprint(dataset: Dataset) -> str:
    """Hash a data set's contents: equal rows in equal order give equal fingerprints.

    The files that the rows come from, and their places in them, do not count.

    Returns:
        16 hexadecimal digits, the same on every machine (unlike `Dataset._fingerprint`).
    """
    digest = hashlib.sha256()
    for row in dataset.remove_columns(PLACE) if PLACE in dataset.column_names else dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _load(
    path: Path,
    normalise: Callable[[dict[str, Any]], dict[str, Any]],
    skip_bad_rows: bool,
    columns: Mapping[str, str] | None = None,
    places: bool = False,
) -> Dataset:
    """Read a file and normalise its rows; raise or warn if there are bad ones."""
    check_columns(columns)
    good, bad, seen = _sort_out(read_rows(path), normalise, columns)
    if not good and not bad:
        raise DataError(f"{path}: the data set is empty; nothing to work on.")
    _require_known(path, columns, seen)
    if bad and (not skip_bad_rows or not good):
        remedy = (
            "Mend them, or go on without them with --skip-bad-rows (skip_bad_rows=True)."
            if good
            else "No row is usable."
        )
        raise DataError(f"{path}: {_describe(bad, len(good) + len(bad))}\n{remedy}")
    if bad:
        warnings.warn(f"{path}: skipped: {_describe(bad, len(good) + len(bad))}", stacklevel=3)

    # A column that one row has must be in all rows.
    for name in ("answer", "tools", "response_ids", "rendering", "truncated"):
        if any(name in row for _, row in good):
            good = [(place, {**row, name: row.get(name)}) for place, row in good]
    if places:
        good = [(place, {**row, PLACE: f"{path}, {place}"}) for place, row in good]
    return Dataset.from_list([row for _, row in good])


def _require_known(path: Path, columns: Mapping[str, str] | None, seen: Sequence[str]) -> None:
    """Check that a file's rows have the columns that are named, or any known field.

    Raises:
        DataError: If they do not.
    """
    require_columns(path, columns, seen)
    if columns is None and seen and not set(seen) & set(FIELDS):
        raise DataError(
            f"{path}: none of its columns is known ({_listed(seen)}); name them by `columns`, such "
            "as {prompt: QUERY, completion: REPLY}, or give a CSV a first line of known names."
        )


def _sort_out(
    rows: Iterable[Row | BadRow],
    normalise: Callable[[dict[str, Any]], dict[str, Any]],
    columns: Mapping[str, str] | None,
) -> tuple[list[tuple[str, dict[str, Any]]], list[BadRow], list[str]]:
    """Return the good rows, each with its place, the bad ones, and the names of all columns."""
    good: list[tuple[str, dict[str, Any]]] = []
    bad: list[BadRow] = []
    seen: dict[str, None] = {}
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        seen.update(dict.fromkeys(row.value))
        try:
            normal = normalise(renamed(row.value, columns))
            if good and type(normal["prompt"]) is not type(good[0][1]["prompt"]):
                raise Unusable(
                    "plain text and conversations are mixed; the first row decides which is meant"
                )
        except Unusable as reason:
            bad.append(BadRow(row.place, str(reason)))
        else:
            good.append((row.place, normal))
    return good, bad, list(seen)


def _describe(bad: list[BadRow], total: int) -> str:
    lines = [f"{len(bad)} of {total} rows cannot be used:"]
    lines += [f"  {row.place}: {row.reason}" for row in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    return "\n".join(lines)
