"""Data as they lie around: each kind of file and folder gives the rows of the plain JSONL."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from flexalign.data import data_fingerprint, load_prompts, load_traces, split_tokens
from flexalign.data.files import PLACE, BadRow, Row, read_rows
from flexalign.errors import DataError

FLAT = [
    {"question": f"{number}+1?", "answer": f'{number + 1}, said "é";\nand no more'}
    for number in range(5)
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
NESTED: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "assistant", "content": "3", "reasoning_content": "It says 3."},
        ],
        "tools": [
            {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello."},
        ]
    },
]


def lines(rows: list[dict[str, Any]], between: str = "\n") -> bytes:
    return between.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def table(rows: list[dict[str, Any]], path: Path, delimiter: str = ",") -> bytes:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


def shards(folder: Path, rows: list[dict[str, Any]], name: str, write: Any) -> Path:
    """Write rows as two shards of a folder, and beside them what repositories have too."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Rows")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "_SUCCESS").touch()
    (folder / ".gitattributes").touch()
    for number, part in enumerate((rows[:1], rows[1:])):
        write(folder / name.format(number), part)
    return folder


def to_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    Dataset.from_list(rows).to_parquet(str(path))


def saved(path: Path, rows: list[dict[str, Any]], *splits: str) -> Path:
    others = {split: Dataset.from_list(rows[:1]) for split in splits}
    DatasetDict(train=Dataset.from_list(rows), **others).save_to_disk(str(path))
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path | int | bytes | None]] = {
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "blank.jsonl": lambda path, rows: path.write_bytes(b"\n" + lines(rows, "\n \r\n\n") + b"\n\n"),
    "rows.parquet": to_parquet,
    "rows.csv": lambda path, rows: table(rows, path),
    "rows.tsv": lambda path, rows: table(rows, path, "\t"),
    "rows.csv.gz": lambda path, rows: path.write_bytes(
        gzip.compress(table(rows, path.with_name("plain.csv")))
    ),
    "lines": lambda path, rows: shards(
        path, rows, "part-{}.jsonl", lambda shard, part: shard.write_bytes(lines(part))
    ),
    "some-gzipped": lambda path, rows: shards(
        path,
        rows,
        "train-0000{}-of-00002.jsonl.gz",
        lambda shard, part: shard.write_bytes(gzip.compress(lines(part))),
    ),
    "parquet": lambda path, rows: shards(path, rows, "train-0000{}-of-00002.parquet", to_parquet),
    "csvs": lambda path, rows: shards(path, rows, "{}.csv", lambda shard, part: table(part, shard)),
    "saved": saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_gives_the_rows_of_the_plain_jsonl(
    tmp_path: Path, hybrid_tokenizer: Any, name: str
) -> None:
    path = tmp_path / name
    for rows in (FLAT, NESTED):
        if rows is NESTED and ("csv" in name or "tsv" in name):
            continue  # a table of text holds no lists
        plain = tmp_path / f"plain-{len(rows)}.jsonl"
        plain.write_bytes(lines(rows))
        if path.is_dir():
            path = tmp_path / f"nested-{name}"
        WRITERS[name](path, rows)

        expected, found = load_traces(plain), load_traces(path)
        assert found.to_list() == expected.to_list()
        assert data_fingerprint(found) == data_fingerprint(expected)
        if rows is FLAT:
            pairs = [list(split_tokens(each, hybrid_tokenizer)) for each in (found, expected)]
            assert pairs[0] == pairs[1]
            said = [row["completion"] for row in found]
            assert said == [[{"role": "assistant", "content": row["answer"]}] for row in FLAT]


def test_a_split_is_named_after_its_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", FLAT, "test", "dev")
    assert len(load_traces(folder / "train")) == 5
    assert len(load_traces(folder / "dev")) == 1
    message = (
        r"saved/eval: .*there is no split 'eval'; the splits of .*saved are train, test, dev\."
    )
    with pytest.raises(DataError, match=message):
        load_traces(folder / "eval")

    # As a clone of a repository on the hub has them.
    for split, rows in (("train", FLAT), ("test", FLAT[:2])):
        for number, part in enumerate((rows[:1], rows[1:])):
            shard = tmp_path / "clone" / "data" / f"{split}-0000{number}-of-00002.parquet"
            shard.parent.mkdir(parents=True, exist_ok=True)
            to_parquet(shard, part)
    clone = tmp_path / "clone"
    assert load_traces(clone / "train").to_list() == load_traces(folder / "train").to_list()
    assert len(load_traces(clone / "test")) == 2
    with pytest.raises(DataError, match=r"has the splits test, train; name one of them, such as"):
        load_traces(clone)
    with pytest.raises(DataError, match=r"no split 'validation'; the splits of .* are test, train"):
        load_traces(clone / "validation")

    # Files that have the names of splits.
    (tmp_path / "named").mkdir()
    for name in ("train.jsonl", "test.jsonl.gz"):
        content = lines(FLAT if name == "train.jsonl" else FLAT[:3])
        content = gzip.compress(content) if name.endswith(".gz") else content
        (tmp_path / "named" / name).write_bytes(content)
    assert len(load_traces(tmp_path / "named" / "test")) == 3
    with pytest.raises(DataError, match="has the splits test, train"):
        load_traces(tmp_path / "named")


def test_a_row_is_named_by_its_file_and_line(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.csv").write_text('question,answer\n\n"two\nlines",3\n1+1?\n"1+2?","3"', "utf-8")
    (folder / "b.csv").write_text('answer,question\n3,1+2?\n"3"x,1+2?\n4,2+2?\n', "utf-8")
    rows = list(read_rows(folder))
    assert [row.place for row in rows] == [
        *("a.csv, line 3", "a.csv, line 5", "a.csv, line 6"),
        *("b.csv, line 2", "b.csv, line 3", "b.csv, line 4"),
    ]
    assert rows[0] == Row("a.csv, line 3", {"question": "two\nlines", "answer": "3"})
    assert rows[1] == BadRow("a.csv, line 5", "1 cells where the header names 2")
    assert rows[2] == Row("a.csv, line 6", {"question": "1+2?", "answer": "3"})
    assert isinstance(rows[4], BadRow)
    assert rows[4].reason.startswith("no CSV (")
    assert rows[5] == Row("b.csv, line 4", {"answer": "4", "question": "2+2?"})
    with pytest.raises(DataError, match=r"(?s)shards: 2 of 6 rows.*\n  a.csv, line 5: 1 cells"):
        load_traces(folder)

    with pytest.warns(UserWarning, match="skipped: 2 of 6"):
        loaded = load_traces(folder, skip_bad_rows=True, places=True)
    places = [f"{folder}, {row.place}" for row in rows if isinstance(row, Row)]
    assert loaded[PLACE] == places
    without = loaded.remove_columns(PLACE)
    assert data_fingerprint(loaded) == data_fingerprint(without)


def test_a_cell_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    table([{"question": "1?", "answer": "1" * 200_000}], path)
    assert len(load_traces(path)["completion"][0][0]["content"]) == 200_000


def test_a_cut_off_table_is_said_to_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n1+1?,2\n1+2?,"it is', "utf-8")
    with pytest.raises(DataError, match=r"line 3: cut off: the file ends inside a quoted cell"):
        load_traces(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"rows.csv": b"1+1?,2\n2+2?,4\n"}, r"none of its columns is known \(1\+1\?, 2\)"),
        ({"rows.csv": b"question;answer\n1;2\n"}, "the columns seem to be separated by ';'"),
        ({"rows.csv": b"question,question\n1,2\n"}, "line 1: the header has the name 'question'"),
        ({"rows.csv": b"question,answer,\n1,2,3\n"}, "the header has a column without a name"),
        ({"rows.csv": b"question,answer\n"}, "the data set is empty"),
        ({"rows.csv": b""}, "the data set is empty"),
        ({"rows.csv": "question,answer\n1,é\n".encode("latin-1")}, "line 2 is not UTF-8"),
        ({"rows.jsonl": b'{"q": "1", "a": "2"}\n'}, r"none of its columns is known \(q, a\)"),
        ({"rows.jsonl.gz": b'{"text": "a"}'}, r"gzip file is damaged or cut off after line 0"),
        (
            {"rows.jsonl.gz": gzip.compress(lines(FLAT) + b"\n" + bytes(range(256)) * 9)[:-50]},
            r"gzip file is damaged or cut off after line \d",
        ),
        ({"rows.parquet.gz": b"PAR1"}, "this kind of file is not known; give JSONL"),
        ({"rows.xlsx": b"PK"}, "this kind of file is not known; give JSONL"),
        (
            {"shards/a.jsonl": lines(FLAT), "shards/b.csv": b"question,answer\n1,2\n"},
            r"shards: a folder of shards holds one kind of file, .* holds a.jsonl and b.csv;",
        ),
        (
            {"shards/a.jsonl": lines(FLAT), "shards/b.jsonl.zst": b"?"},
            r"this one holds a.jsonl and b.jsonl.zst; name one file",
        ),
        (
            {"shards/a.jsonl": lines(FLAT), "shards/eval.jsonl": lines(FLAT)},
            r"the files of the split eval stand beside a.jsonl, which belongs to none",
        ),
        (
            {"shards/a.jsonl": lines(FLAT), "shards/more/b.jsonl": lines(FLAT)},
            r"it holds data files and the folder more of further ones",
        ),
        (
            {"shards/en/a.jsonl": lines(FLAT), "shards/de/b.jsonl": lines(FLAT)},
            r"holds no data file .* name one of its folders, de, en\.",
        ),
        ({"shards/notes.txt": b"hello"}, "this folder holds no data file"),
        ({"shards/a.jsonl": b"\n", "shards/b.jsonl": b""}, "shards: the data set is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError, match=message) as caught:
            load_traces(tmp_path / next(iter(files)).split("/")[0], skip_bad_rows=skip)
        told = str(caught.value).removeprefix(str(tmp_path))
        assert "\n" not in told
        assert told.endswith(".")


def test_a_missing_file_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(FLAT))
    for name in ("test.jsonl", "none/train"):
        with pytest.raises(DataError, match=rf"{name}: no such file or folder"):
            load_traces(tmp_path / name)
    with pytest.raises(DataError, match=r"there is no split 'test'; the splits of .* are train"):
        load_traces(tmp_path / "test")


def test_prompts_are_read_by_the_same_reader(tmp_path: Path) -> None:
    saved(tmp_path / "saved", FLAT, "test")
    prompts = load_prompts(tmp_path / "saved" / "train")
    assert prompts["prompt"] == [[{"role": "user", "content": row["question"]}] for row in FLAT]
