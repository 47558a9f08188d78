"""Folders of data: which of their files hold rows, of which kind, and of which split.

A folder holds shards of one kind, side by side or in its subfolder ``data``, as the hub's
repositories do, or a data set that `datasets` has saved. Shards of a split are named
``train-00000-of-00002``; a file may also be named by the split alone, such as ``test.jsonl``.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from flexalign.errors import DataError

READABLE = (
    "JSONL, JSON or CSV (also with gzip, .gz), Parquet, a folder of such shards, or a folder "
    "written by datasets' save_to_disk"
)

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_NO_DATA = (
    "readme",
    "license",
    "licence",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
)
"""How the names of files begin that stand beside data and hold none."""

_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}\b.*\Z")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
_SAVED = "dataset_dict.json"
"""The file in which `datasets` names the splits of a saved data set."""


def kind_of(path: Path) -> str:
    """Return the kind of a file by its name: ``jsonl``, ``json``, ``csv`` or ``parquet``.

    Raises:
        DataError: If it is none of them.
    """
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: this kind of file is not known; give {READABLE}.")
    return kind


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    kind = _KINDS.get(Path(name.removesuffix(".gz")).suffix)
    # Parquet is compressed inside, so nothing writes it with gzip.
    return None if kind == "parquet" and name.endswith(".gz") else kind


def is_saved(folder: Path) -> bool:
    """Return whether `datasets` has saved a data set, or several splits of one, in a folder."""
    return any((folder / name).is_file() for name in (_SAVED, "state.json"))


def split_of(path: Path) -> tuple[Path, str | None]:
    """Read a path that names a split of a folder, such as ``folder/train``.

    Args:
        path: The path. There need not be such a file or folder.

    Returns:
        The folder and the split; for any other path the path itself, and None.
    """
    folder = path.parent
    if path.exists() or path.suffix or not folder.is_dir():
        return path, None
    is_split = bool(_saved_splits(folder) if is_saved(folder) else _splits(_listed(folder)))
    return (folder, path.name) if is_split else (path, None)


def choose_split(folder: Path, splits: Iterable[str], split: str | None) -> str:
    """Return a split's name, or that of the only one.

    Args:
        folder: The folder, for messages.
        splits: The splits that it has.
        split: The split that is asked for; None for the only one.

    Raises:
        DataError: If there is no such split, or there are several and none is asked for.
    """
    known = list(splits)
    if split is None and len(known) != 1:
        raise DataError(
            f"{folder}: this data set has the splits {', '.join(known)}; "
            f"name one of them, such as {folder / known[0]}."
        )
    if split is not None and split not in known:
        raise DataError(
            f"{folder / split}: no such file or folder, and there is no split {split!r}; the splits "
            f"of {folder} are {', '.join(known)}."
        )
    return known[0] if split is None else split


def data_files(folder: Path, split: str | None) -> list[Path]:
    """Return the shards of a folder, or of one of its splits, in the order of their names.

    Args:
        folder: The folder.
        split: The split; None if it has one alone, or none.

    Raises:
        DataError: If there are no shards, they are of several kinds, or of several splits and
            none is asked for.
    """
    files = _listed(folder)
    if not files:
        inside = [each.name for each in _folders(folder) if _direct(each)]
        advice = f"name one of its folders, {', '.join(inside)}" if inside else f"give {READABLE}"
        raise DataError(
            f"{folder}: this folder holds no data file and is not a data set written by datasets' "
            f"save_to_disk; {advice}."
        )
    _require_one_kind(folder, files)

    splits = _splits(files)
    if not splits:
        return files
    loose = [each.name for each in files if _split(each) is None]
    if loose:
        raise DataError(
            f"{folder}: the files of the split{'s' if len(splits) > 1 else ''} "
            f"{', '.join(splits)} stand beside {loose[0]}, which belongs to none; name one file, "
            "or put them into folders of their own."
        )
    return splits[choose_split(folder, splits, split)]


def _require_one_kind(folder: Path, files: list[Path]) -> None:
    """Check that all files are data of one kind, and that no subfolder holds further ones.

    Raises:
        DataError: If not; it names two that differ.
    """
    first = next(each for each in files if _kind(each) is not None)
    other = next((each for each in files if _kind(each) != _kind(first)), None)
    if other is not None:
        raise DataError(
            f"{folder}: a folder of shards holds one kind of file, and this one holds {first.name} "
            f"and {other.name}; name one file, or put each kind into a folder of its own."
        )
    further = [each.name for each in _folders(first.parent) if _direct(each)]
    if further:
        raise DataError(
            f"{folder}: it holds data files and the folder {further[0]} of further ones; name one "
            "of them, or put all into one folder."
        )


def _listed(folder: Path) -> list[Path]:
    """Return the files in a folder, or else in its subfolder ``data``, if any of them holds data."""
    return _direct(folder) or _direct(folder / "data")


def _direct(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [
        each
        for each in sorted(folder.iterdir())
        if each.is_file()
        and not each.name.startswith((".", "_"))
        and not each.name.lower().startswith(_NO_DATA)
        and each.suffix.lower() != ".md"
    ]
    return files if any(_kind(each) for each in files) else []


def _folders(folder: Path) -> list[Path]:
    return [
        each
        for each in sorted(folder.iterdir())
        if each.is_dir() and not each.name.startswith((".", "_"))
    ]


def _splits(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the splits that the names of files tell, each with its files."""
    found: dict[str, list[Path]] = {}
    for file in files:
        if (split := _split(file)) is not None:
            found.setdefault(split, []).append(file)
    return found


def _split(file: Path) -> str | None:
    if shard := _SHARD.match(file.name):
        return shard["split"]
    stem = file.name.partition(".")[0]
    return stem if stem.lower() in _SPLITS else None


def _saved_splits(folder: Path) -> list[str]:
    """Return the splits of a saved data set; empty if it has none, or its list cannot be read."""
    try:
        told = json.loads((folder / _SAVED).read_text(encoding="utf-8"))
        return [str(split) for split in told["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
