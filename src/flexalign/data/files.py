"""Reading of rows from files: each row with its place in the file, each bad row with the reason.

The fields of a row are not interpreted here, but in `formats.py`. JSONL, JSON and CSV are parsed
here, because the readers of `datasets` do not keep the line of a bad row. Parquet and saved data
sets are read by pyarrow and `datasets`.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from flexalign.data.folders import choose_split, data_files, is_saved, kind_of, split_of
from flexalign.errors import DataError

PLACE = "place"
"""The column of a row's file and line in a data set that is loaded with `places`."""


class Unusable(Exception):  # noqa: N818 (a finding about one row, never seen by a user)
    """The reason why a row cannot be used; the loader catches it and adds the row's place."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        place: Its place in the file, such as "line 5", or in the folder, such as "b.jsonl, line 5".
        value: Its fields.
    """

    place: str
    value: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        place: Its place, as of `Row`.
        reason: Why it cannot be used.
    """

    place: str
    reason: str


def place_of(row: Mapping[str, Any], number: int) -> str:
    """Return where a row of a data set stands, for messages.

    Args:
        row: A row; if its data set was loaded with `places`, it names file and line.
        number: The row's number from 1, for any other row.
    """
    return str(row.get(PLACE) or f"row {number}")


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """Read rows from a file, from a folder of shards, or from a saved Hugging Face data set.

    Args:
        path: A file (JSONL, JSON, CSV, also with gzip, or Parquet) or a folder (shards of one of
            these kinds, or a data set written by `save_to_disk`). A folder of several splits is
            followed by the name of one: ``folder/train``. The suffix decides the format; a
            `.json` file may contain a list of rows or one row per line.

    Returns:
        An iterator over the rows, in order; shards in the order of their names. A row that is cut
        off, not UTF-8 or not a row with named fields is a `BadRow`, so that the caller can name
        all of them at once. Blank lines are no rows.

    Raises:
        DataError: If there is no such file or split, its format is not known, a folder holds
            several kinds of files or several splits, or a file cannot be read as a whole.
    """
    folder, split = (path, None) if path.exists() else split_of(path)
    if not folder.exists():
        raise DataError(f"{path}: no such file or folder.")
    if not folder.is_dir():
        return _file_rows(folder)
    if is_saved(folder):
        return _saved_rows(folder, split)
    return _shard_rows(folder, data_files(folder, split))


def _file_rows(path: Path) -> Iterator[Row | BadRow]:
    match kind_of(path):
        case "jsonl":
            return _json_lines(path)
        case "json":
            return _json_rows(path)
        case "csv":
            return _csv_rows(path)
        case _:
            return _parquet_rows(path)


def _shard_rows(folder: Path, shards: list[Path]) -> Iterator[Row | BadRow]:
    for shard in shards:
        name = shard.relative_to(folder).as_posix()
        for row in _file_rows(shard):
            place = f"{name}, {row.place}"
            match row:
                case Row():
                    yield Row(place, row.value)
                case BadRow():
                    yield BadRow(place, row.reason)


# Text: lines of JSON, one list of JSON, or CSV; each also with gzip.


def _open(path: Path) -> BinaryIO:
    is_zipped = path.suffix.lower() == ".gz"
    return cast("BinaryIO", gzip.open(path, "rb") if is_zipped else path.open("rb"))


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file.

    Raises:
        DataError: If a file with gzip is cut off or damaged.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):  # noqa: B007 (told after the loop)
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip file is damaged or cut off after line {number} ({error}); "
            "copy it again."
        ) from error


def _text(path: Path) -> str:
    """Return a file's text.

    Raises:
        DataError: If it is not UTF-8, or a file with gzip is damaged.
    """
    content = b"".join(_lines(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; save the file as UTF-8.") from error


def _json_lines(path: Path) -> Iterator[Row | BadRow]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _parse_line(f"line {number}", line)


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
    text = _text(path)
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


def _csv_rows(path: Path) -> Iterator[Row | BadRow]:
    """Read a table whose first line names its columns; a row's place is the line where it begins."""
    # Python's own limit, 131,072 characters in a cell, is less than a long response.
    csv.field_size_limit(2**31 - 1)
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    reader = csv.reader(
        io.StringIO(_text(path), newline=""), delimiter="\t" if tabs else ",", strict=True
    )

    names: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cut_off = "unexpected end of data" in str(error)
            yield BadRow(
                place,
                "cut off: the file ends inside a quoted cell" if cut_off else f"no CSV ({error})",
            )
            continue

        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = _header(path, place, cells)
        elif len(cells) != len(names):
            yield BadRow(place, f"{len(cells)} cells where the header names {len(names)}")
        else:
            yield Row(place, dict(zip(names, cells, strict=True)))


def _header(path: Path, place: str, cells: list[str]) -> list[str]:
    """Return the names in a table's header.

    Raises:
        DataError: If a name is empty or occurs twice, or the columns are separated otherwise.
    """
    names = [cell.strip() for cell in cells]
    other = next((mark for mark in (";", "\t", ",") if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise DataError(
            f"{path}, {place}: the columns seem to be separated by {other!r}; separate them by "
            "commas, or by tabs in a .tsv file."
        )
    for name in names:
        if not name or names.count(name) > 1:
            told = f"the name {name!r} twice" if name else "a column without a name"
            raise DataError(f"{path}, {place}: the header has {told}; give each column a name.")
    return names


# Tables with types.


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


def _saved_rows(path: Path, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: this data set cannot be read ({error}); copy it again."
        ) from error

    if isinstance(saved, datasets.DatasetDict):
        saved = saved[choose_split(path, list(saved), split)]
    elif split is not None:
        raise DataError(f"{path / split}: the data set {path} has no splits; leave {split} out.")
    return _numbered(saved)


def _numbered(rows: Any) -> Iterator[Row]:
    """Yield rows without the fields that are None, which a table has for absent ones."""
    for number, row in enumerate(rows, start=1):
        yield Row(f"row {number}", _without_none(row))


def _without_none(value: Any) -> Any:
    """Remove None from mappings inside mappings and lists.

    Arrow gives all mappings of a column the same keys, such as all tools the same parameters.
    """
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
