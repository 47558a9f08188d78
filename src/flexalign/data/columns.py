"""The names of fields that rows are read by, and other names for them: `columns`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexalign._spelling import nearest
from flexalign.errors import ConfigError, DataError

FIELDS = (
    *("prompt", "completion", "response", "messages", "conversations"),
    *("instruction", "input", "output", "history"),
    *("problem", "solution", "question", "answer"),
    *("chosen", "rejected", "text"),
    *("system", "tools", "reasoning_content"),
)
"""The fields of the known forms, which `columns` may name other columns for."""


def check_columns(columns: Mapping[str, Any] | None) -> None:
    """Check the mapping from fields to the columns of a file.

    Args:
        columns: The mapping, such as ``{"prompt": "query", "completion": "reply"}``; None for none.

    Raises:
        ConfigError: If a field is not known (the nearest known one is named), a column's name is
            not text, or the mapping is empty.
    """
    if columns is None:
        return
    if not columns:
        raise ConfigError(
            "columns is empty; name the file's columns, such as {prompt: query, completion: reply}."
        )
    for field, column in columns.items():
        if field not in FIELDS:
            meant = nearest(field, FIELDS, prefix="columns.")
            raise ConfigError(f"unknown key {f'columns.{field}'!r}{meant}")
        if not isinstance(column, str) or not column:
            raise ConfigError(f"columns.{field} must be the name of a column, got {column!r}.")


def parse_columns(texts: Iterable[str] | None, option: str) -> dict[str, str] | None:
    """Read columns from ``FIELD=COLUMN`` texts.

    Args:
        texts: The texts; None or none for no columns.
        option: The option that they were given with, for messages.

    Raises:
        ConfigError: If a text has no ``=``, or as in `check_columns`.
    """
    columns: dict[str, str] = {}
    for text in texts or ():
        field, equals, column = text.partition("=")
        if not equals:
            raise ConfigError(f"{option} {text!r}: write FIELD=COLUMN, such as problem=query.")
        columns[field.strip()] = column
    check_columns(columns or None)
    return columns or None


def renamed(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """Return a row with the fields that `columns` names, and no others; all if there is none.

    Fields that are null count as absent, as tables have them.
    """
    if columns is None:
        return {field: value for field, value in row.items() if value is not None}
    return {
        field: value for field, column in columns.items() if (value := row.get(column)) is not None
    }


def require_columns(path: Path, columns: Mapping[str, str] | None, seen: Iterable[str]) -> None:
    """Check that some row of a file has each column that is named.

    Args:
        path: The file, for messages.
        columns: As in `check_columns`.
        seen: The columns that the rows of the file have.

    Raises:
        DataError: If no row has a column.
    """
    known = list(seen)
    for field, column in (columns or {}).items():
        if column not in known:
            raise DataError(
                f"{path}: no row has the column {column!r} that columns.{field} names"
                f"{nearest(column, known)}"
            )
