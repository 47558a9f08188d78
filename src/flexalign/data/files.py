"""Reading of rows from files: each row with its place in the file, each bad row with the reason.

The fields of a row are not interpreted here, but in `formats.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign.errors import DataError

_READABLE = ".jsonl, .json, .parquet, or a folder written by datasets' save_to_disk"


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        place: Its place in the file, such as "line 5".
        value: Its fields.
    """

    place: str
    value: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        place: Its place in the file, such as "line 5".
        reason: Why it cannot be used.
    """

    place: str
    reason: str


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """Read a JSONL, JSON or Parquet file, or a saved Hugging Face data set, row by row.

    Args:
        path: The file or folder. The suffix decides the format; a `.json` file may contain a list
            of rows or one row per line.

    Returns:
        An iterator over the rows, in order. A row that is cut off, empty, not UTF-8 or not a JSON
        object is a `BadRow`, so that the caller can name all of them at once.

    Raises:
        DataError: If there is no such file, its format is not known, or it cannot be read as a
            whole.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    if path.is_dir():
        return _saved_rows(path)
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _json_lines(path)
        case ".json":
            return _json_rows(path)
        case ".parquet":
            return _parquet_rows(path)
    raise DataError(f"{path}: this kind of file is not known; give {_READABLE}.")


def _json_lines(path: Path) -> Iterator[Row | BadRow]:
    blank: list[BadRow] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number}"
            if not line.strip():
                blank.append(BadRow(place, "empty line"))
                continue
            yield from blank  # blank lines at the end of the file are not reported
            blank.clear()
            yield _parse_line(place, line)


def _parse_line(place: str, line: bytes) -> Row | BadRow:
    cut_off = not line.endswith(b"\n")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if cut_off and error.reason == "unexpected end of data":
            return BadRow(place, "cut off: the file ends inside this line")
        return BadRow(place, f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        if cut_off:
            return BadRow(place, "cut off: the file ends inside this line")
        return BadRow(place, f"not JSON ({error.msg}, column {error.colno})")
    return _object(place, value)


def _json_rows(path: Path) -> Iterator[Row | BadRow]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; save the file as UTF-8.") from error
    start = text.lstrip()[:1]
    if start == "{":
        yield from _json_lines(path)
    elif start == "[":
        yield from _json_list(text)
    elif start:
        raise DataError(f"{path}: this is not JSON; the file must hold a list of rows.")


def _json_list(text: str) -> Iterator[Row | BadRow]:
    """Parse a JSON list element by element, so that an error is reported for its own row."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        place = f"line {line}"

        if position == len(text):
            yield BadRow(place, "cut off: the file ends inside its list")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield BadRow(place, f"not JSON ({error.msg}, line {error.lineno}); nothing read after")
            return
        yield _object(place, value)

        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif position < len(text) and text[position] != "]":
            yield BadRow(place, "no comma after this row; nothing read after")
            return


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _object(place: str, value: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(place, f"a {type(value).__name__} where a row with named fields is expected")
    return Row(place, value)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = [row for batch in batches for row in batch.to_pylist()]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: this Parquet file cannot be read ({error}); copy it again."
        ) from error
    return _numbered(rows)


def _saved_rows(path: Path) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: this folder is not a data set written by datasets' save_to_disk; "
            f"give {_READABLE}."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: this data set cannot be read ({error}); copy it again."
        ) from error

    if isinstance(saved, datasets.DatasetDict):
        splits = list(saved)
        if len(splits) != 1:
            raise DataError(
                f"{path}: this data set has the splits {', '.join(splits)}; "
                f"name one of them, such as {path / splits[0]}."
            )
        saved = saved[splits[0]]
    return _numbered(saved)


def _numbered(rows: Any) -> Iterator[Row]:
    """Yield rows without the fields that are None, which a table has for absent ones."""
    for number, row in enumerate(rows, start=1):
        yield Row(f"row {number}", {key: value for key, value in row.items() if value is not None})
