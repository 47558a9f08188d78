"""Data formats in, one form out: TRL's prompt–completion, conversational or plain.

Recognised are TRL's forms (`prompt` + `completion`, `messages`, `text`), ShareGPT
(`conversations` of `from`/`value`) and Alpaca (`instruction`, `input`, `output`). Everything
becomes a `prompt` and a `completion`, so that TRL's completion-only loss counts the response and
nothing else.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from flexalign.data.files import BadRow, Row, read_rows
from flexalign.data.rows import Unusable, preference_row, prompt_row, trace_row
from flexalign.errors import DataError

__all__ = ["data_fingerprint", "load_preferences", "load_prompts", "load_traces"]

_SHOWN = 5


def load_traces(path: str | Path, *, skip_bad_rows: bool = False) -> Dataset:
    """Load prompts with their responses.

    Of a conversation the last assistant message is the completion and all before it the prompt.
    A row of `text` alone is all completion, after an empty prompt.

    Args:
        path: A JSONL, JSON or Parquet file, or a saved Hugging Face data set.
        skip_bad_rows: Leave bad rows out, with a warning that counts them, instead of stopping.

    Returns:
        A data set with `prompt` and `completion`, both lists of messages or both text, and, where
        any row has one, `answer` (text or None).

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

    A `prompt` that is text is given to the model as it is; `problem`, `question`, `instruction`
    (with `input`), `messages` and `conversations` become messages, for the chat template. A
    response that a row already has is left away.

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
    if any("answer" in row for row in good):
        good = [{**row, "answer": row.get("answer")} for row in good]
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
