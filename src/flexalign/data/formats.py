"""Readers of data formats; all rows become TRL's prompt–completion form.

The formats are TRL's (`prompt` + `completion`, `messages`, `text`), ShareGPT (`conversations` of
`from`/`value`) and Alpaca (`instruction`, `input`, `output`). Every row becomes a `prompt` and a
`completion`, both messages or both text, so that TRL's completion-only loss counts the response
only.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from flexalign.data.files import BadRow, Row, read_rows
from flexalign.data.template import REASONING_KEYS, reasoning_of
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
    "prompt and completion, messages, conversations (ShareGPT), "
    "instruction and output (Alpaca), or text"
)
_PROMPT_FORMS = "prompt, problem, question, instruction, messages or conversations"


class Unusable(Exception):  # noqa: N818 (a finding about one row, never seen by a user)
    """The reason why a row cannot be used; the loader catches it and adds the row's place."""


def trace_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row as a prompt with its response.

    Returns:
        `prompt` and `completion`, both messages or both text; `answer` if the row has one; and
        `response_ids`, `rendering` and `truncated` where the response was sampled.

    Raises:
        Unusable: If the row has no known form, or a part is missing or empty.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = _text_or_messages(row, "prompt"), _text_or_messages(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise Unusable("of prompt and completion one is text and the other is messages")
    elif "chosen" in row and "rejected" in row:
        raise Unusable("a preference pair has no single response; keep one as completion")
    elif (messages := _conversation(row)) is not None:
        if messages[-1]["role"] != "assistant":
            raise Unusable(
                f"the conversation ends with a message of role {messages[-1]['role']!r}, "
                "not with the assistant's response"
            )
        prompt, completion = messages[:-1], messages[-1:]
    elif "instruction" in row:
        prompt = _alpaca_prompt(row)
        completion = [_message("assistant", _text(row, "output"))]
    elif "text" in row:
        prompt, completion = "", _text(row, "text")
    else:
        raise Unusable(f"unknown fields {_names(row)}; expected {_TRACE_FORMS}")

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
    return {"prompt": prompt, "completion": completion} | _answer(row) | _sampled(row)


def preference_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row as a prompt with a chosen and a rejected response.

    If a row has no `prompt` and its responses are conversations, the messages before the last
    one are the prompt; they must be the same in both.

    Returns:
        `prompt`, `chosen` and `rejected`, all messages or all text.

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
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompt_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row as a prompt to be answered.

    Returns:
        `prompt`, messages or text, and `answer` if the row has one.

    Raises:
        Unusable: If the row has no known form, or its prompt is missing or empty.
    """
    prompt: str | Messages
    if (messages := _conversation(row)) is not None:
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not prompt:
            raise Unusable("there is no message before the response")
    elif "prompt" in row:
        prompt = _text_or_messages(row, "prompt")
    elif "instruction" in row:
        prompt = _alpaca_prompt(row)
    elif key := next((key for key in ("problem", "question") if key in row), None):
        prompt = [_message("user", _text(row, key))]
    else:
        raise Unusable(f"unknown fields {_names(row)}; expected {_PROMPT_FORMS}")

    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with the assistant's message; nothing is left to answer")
    return {"prompt": prompt} | _answer(row)


def _conversation(row: dict[str, Any]) -> Messages | None:
    for key in ("messages", "conversations"):
        if key in row:
            return _with_system(row, _messages(row, key))
    return None


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
    """Return a message with `role`, `content`, its thinking and its other fields of text."""
    if not isinstance(message, dict):
        raise Unusable(f"{where} is not a message with a role and a content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise Unusable(f"{where} has the unknown role {role!r}")
    if message.get("tool_calls"):
        raise Unusable(f"{where} calls tools, which is not supported")

    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = _joined_parts(where, content)
    if content is None and reasoning_of(message):
        content = ""
    if not isinstance(content, str):
        raise Unusable(f"{where} has no text")

    known = {"role", "from", "content", "value", *REASONING_KEYS}
    extras = {
        key: value for key, value in message.items() if key not in known and isinstance(value, str)
    }
    if thinking := reasoning_of(message):
        extras["reasoning_content"] = _valid(f"{where}'s thinking", thinking)
    if not content.strip() and not thinking:
        raise Unusable(f"{where} is empty")
    return _message(_ROLES[role], _valid(where, content)) | extras


def _joined_parts(where: str, parts: list[Any]) -> str:
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
        raise Unusable(f"{where} has parts that are not text")
    return "".join(str(part.get("text", "")) for part in parts)


def _alpaca_prompt(row: dict[str, Any]) -> Messages:
    if row.get("history"):
        raise Unusable("Alpaca's history field is not supported; write the turns as messages")
    instruction, context = _text(row, "instruction"), row.get("input")
    if isinstance(context, str) and context.strip():
        instruction = f"{instruction}\n\n{_valid('input', context)}"
    return _with_system(row, [_message("user", instruction)])


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
    if row.get("truncated") is True:
        told["truncated"] = True
    return told


def _names(row: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "(none)"


# Whole files.

_SHOWN = 5
"""How many bad rows an error message names."""


def load_traces(path: str | Path, *, skip_bad_rows: bool = False) -> Dataset:
    """Load prompts with their responses.

    In a conversation the last message must be the assistant's: it is the completion, and the
    messages before it are the prompt. A row with `text` only has an empty prompt, and the text is
    its completion.

    Args:
        path: A JSONL, JSON or Parquet file, or a saved Hugging Face data set.
        skip_bad_rows: Leave bad rows out with a warning that counts them; otherwise they raise.

    Returns:
        A data set with `prompt` and `completion`, both lists of messages or both text. Where any
        row has them, it also has the columns `answer` (text or None) and, of sampled responses,
        `response_ids`, `rendering` and `truncated`.

    Raises:
        DataError: If the file cannot be read, has no usable row, or has bad rows (the first few
            are named by line) and `skip_bad_rows` is not set.
    """
    return _load(Path(path), trace_row, skip_bad_rows)


def load_preferences(path: str | Path, *, skip_bad_rows: bool = False) -> Dataset:
    """Load prompts with a chosen and a rejected response, as DPO takes them.

    Args:
        path: As in `load_traces`.
        skip_bad_rows: As in `load_traces`.

    Returns:
        A data set with `prompt`, `chosen` and `rejected`, all lists of messages or all text.

    Raises:
        DataError: As in `load_traces`.
    """
    return _load(Path(path), preference_row, skip_bad_rows)


def load_prompts(path: str | Path, *, skip_bad_rows: bool = False) -> Dataset:
    """Load prompts to be answered.

    A `prompt` that is text is given to the model unchanged. `problem`, `question`, `instruction`
    (with `input`), `messages` and `conversations` become messages for the chat template. A
    response that a row already has is left out.

    Args:
        path: As in `load_traces`.
        skip_bad_rows: As in `load_traces`.

    Returns:
        A data set with `prompt` (messages or text) and, where any row has one, `answer`.

    Raises:
        DataError: As in `load_traces`.
    """
    return _load(Path(path), prompt_row, skip_bad_rows)


def data_fingerprint(dataset: Dataset) -> str:
    """Hash a data set's contents: equal rows in equal order give equal fingerprints.

    Returns:
        16 hexadecimal digits, the same on every machine (unlike `Dataset._fingerprint`).
    """
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _load(
    path: Path, normalise: Callable[[dict[str, Any]], dict[str, Any]], skip_bad_rows: bool
) -> Dataset:
    """Read a file and normalise its rows; raise or warn if there are bad ones."""
    good, bad = _sort_out(read_rows(path), normalise)
    if not good and not bad:
        raise DataError(f"{path}: the data set is empty; nothing to work on.")
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
    for name in ("answer", "response_ids", "rendering", "truncated"):
        if any(name in row for row in good):
            good = [{**row, name: row.get(name)} for row in good]
    return Dataset.from_list(good)


def _sort_out(
    rows: Iterable[Row | BadRow], normalise: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[BadRow]]:
    good: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            normal = normalise(row.value)
            if good and type(normal["prompt"]) is not type(good[0]["prompt"]):
                raise Unusable(
                    "plain text and conversations are mixed; the first row decides which is meant"
                )
        except Unusable as reason:
            bad.append(BadRow(row.place, str(reason)))
        else:
            good.append(normal)
    return good, bad


def _describe(bad: list[BadRow], total: int) -> str:
    lines = [f"{len(bad)} of {total} rows cannot be used:"]
    lines += [f"  {row.place}: {row.reason}" for row in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    return "\n".join(lines)
